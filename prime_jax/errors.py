"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class UserError(Exception):
    """Bad input or environment, told in one line: what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


class NoData(UserError):
    """The data of a run is not here: a fault of the machine, which no run is charged for."""
