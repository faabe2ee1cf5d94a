"""Exceptions for wrong input or environment, as opposed to errors of the program."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError: a disk or a quota is full


class UserError(Exception):
    """Bad input or environment. The message is one line: what is wrong, where, what is expected.

    The command line prints it without a traceback and exits with code 2.
    """


class NoData(UserError):
    """The data of a run is not on this machine; this does not count as a failure of the run."""
