"""TensorBoard's event files, read without TensorFlow.

The records are parsed by the classes of the `tensorboard` package. Its own reader of files is left
out: it computes the checksum of every record in Python, which takes twenty times as long as all
the rest. A file that is still written ends in half a record.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from prime_jax.errors import UserError

PATTERN = "*tfevents*"  # of file names
HEADER = struct.Struct("<QI")  # length of a record, checksum of that; a checksum follows the record
CHECKSUM = 4
Logged = tuple[str, float | None, Any]  # name, step (None: a setting of the run), value


def read(data: bytes, path: Path) -> Iterator[Logged]:
    """The scalars of a file, and the settings that the hparams plug-in wrote.

    Raises:
        UserError: the file is damaged, or `tensorboard` is not installed.
    """
    event_pb2 = _import()
    at = 0
    while at + HEADER.size <= len(data):
        length, _ = HEADER.unpack_from(data, at)
        at += HEADER.size
        if at + length + CHECKSUM > len(data):
            return
        try:
            event = event_pb2.Event.FromString(data[at : at + length])
        except Exception as error:  # protobuf's DecodeError, which is not ours to import
            raise UserError(f"{path}: a damaged event file (byte {at})") from error
        at += length + CHECKSUM
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                yield value.tag, event.step, value.simple_value
            elif value.metadata.plugin_data.plugin_name == "hparams":
                yield from _settings(value.metadata.plugin_data.content)
            elif kind == "tensor":
                yield from _scalar(value, event.step)


def _import() -> ModuleType:
    try:
        from tensorboard.compat.proto import event_pb2
    except ImportError as error:
        raise UserError(
            "event files of TensorBoard: install prime_jax[tensorboard] to read them"
        ) from error
    return event_pb2


def _scalar(value: Any, step: int) -> Iterator[Logged]:
    """What newer writers store as a tensor of one number."""
    from tensorboard.util import tensor_util

    if not any(size.size > 1 for size in value.tensor.tensor_shape.dim):
        array = tensor_util.make_ndarray(value.tensor)
        if array.size == 1 and array.dtype.kind in "fiu":
            yield value.tag, step, float(array.reshape(()))


def _settings(content: bytes) -> Iterator[Logged]:
    from tensorboard.plugins.hparams import plugin_data_pb2

    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    for name, value in data.session_start_info.hparams.items():
        kind = value.WhichOneof("kind")
        if kind in ("number_value", "string_value", "bool_value"):
            yield name, None, getattr(value, kind)
