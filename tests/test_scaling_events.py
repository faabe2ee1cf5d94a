"""TensorBoard's event files, written here by its own writer of records."""

import pytest

from prime_jax.errors import UserError
from prime_jax.scaling import events, readers
from prime_jax.scaling.settings import Choice

REASON = "tensorboard is not installed: pip install 'prime_jax[tensorboard]'"
event_pb2 = pytest.importorskip("tensorboard.compat.proto.event_pb2", reason=REASON)


def write(path, *parts):
    """An event file of (step, summary value as keywords)."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(event_pb2.Event(file_version="brain.Event:2").SerializeToString())
        for step, value in parts:
            event = event_pb2.Event(step=step)
            event.summary.value.add(**value)
            writer.write(event.SerializeToString())
        writer.flush()
    return path


def scalar(step, tag, value):
    return step, {"tag": tag, "simple_value": value}


def tensor(step, tag, array):
    from tensorboard.util.tensor_util import make_tensor_proto

    return step, {"tag": tag, "tensor": make_tensor_proto(array)}


def settings(**values):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = HParamsPluginData()
    for name, value in values.items():
        kind = "string_value" if isinstance(value, str) else "number_value"
        setattr(data.session_start_info.hparams[name], kind, value)
    plugin = {"plugin_name": "hparams", "content": data.SerializeToString()}
    return 0, {"tag": "_hparams_/session_start_info", "metadata": {"plugin_data": plugin}}


def test_scalars_and_settings_of_one_file(tmp_path):
    path = write(
        tmp_path / "events.out.tfevents.1.host",
        scalar(1, "loss", 3.5),
        tensor(2, "val/loss", 2.25),
        tensor(2, "histogram", [1.0, 2.0]),
        tensor(2, "text", "hello"),
        settings(n_params=1e8, arch="arm"),
    )
    data = path.read_bytes()
    expected = {
        ("loss", 1, 3.5),
        ("val/loss", 2, 2.25),
        ("n_params", None, 1e8),
        ("arch", None, "arm"),
    }
    assert set(events.read(data, path)) == expected
    assert list(events.read(data[:-3], path))[:2] == [("loss", 1, 3.5), ("val/loss", 2, 2.25)]
    damaged = data[:60].replace(b"loss", b"\xff\xff\xff\xff")
    with pytest.raises(UserError, match="damaged event file"):
        list(events.read(damaged + data[60:], path))


def test_runs_are_directories(tmp_path):
    """A resumed run has two files, of which the second begins before the first one ended."""
    for k, size in enumerate((1e8, 2e8)):
        run = tmp_path / f"arm_{size:.0f}"
        first = [scalar(step, "eval/loss", 4 - step / 10) for step in (1, 2, 3)]
        write(run / "events.out.tfevents.1", *first, scalar(3, "params", size))
        again = [scalar(step, "eval/loss", 3 + k - step / 10) for step in (2, 4)]
        write(run / "events.out.tfevents.2", *again)
        write(run / "17.5" / "events.out.tfevents.3", settings(tokens=1e9))
    said = []
    choice = Choice(name_pattern="{family}_{}")
    table, logs = readers.read_with_curves(tmp_path, None, choice, said.append)
    assert len(said) == 6
    assert [row["run"] for row in table.rows] == ["arm_100000000", "arm_200000000"]
    row = table.rows[1]
    assert (row["family"], row["params"], row["tokens"], row["step"]) == ("arm", 2e8, 1e9, 4)
    assert row["loss"] == pytest.approx(3.6)
    assert logs.runs[row["run"]].clock == [1, 2, 4]
    assert logs.runs[row["run"]].loss == pytest.approx([3.9, 3.8, 3.6])


def test_files_without_a_scalar(tmp_path):
    write(tmp_path / "a" / "events.out.tfevents.1")
    with pytest.raises(UserError, match="without a scalar"):
        readers.read(tmp_path)


def test_one_file_is_no_table_of_runs(tmp_path):
    path = write(tmp_path / "events.out.tfevents.1", scalar(1, "loss", 3.5))
    with pytest.raises(UserError, match="give the directory of all runs"):
        readers.read(path)
