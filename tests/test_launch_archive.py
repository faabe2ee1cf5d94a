import io
import subprocess
import tarfile

import pytest

from prime_jax import shipped
from prime_jax.errors import UserError
from prime_jax.launch import archive, engine


@pytest.fixture
def checkout(tmp_path):
    repo = tmp_path / "repo"
    (repo / "package").mkdir(parents=True)
    for command in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", "-C", repo, *command], check=True)
    (repo / "package" / "code.py").write_text("x = 1\n")
    (repo / "run.sh").write_text("true\n")
    (repo / "run.sh").chmod(0o755)
    (repo / ".gitignore").write_text("ignored/\n")
    subprocess.run(["git", "-C", repo, "add", "."], check=True)
    return repo


def members(packed) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(packed.data)) as tar:
        return {info.name: info for info in tar}


def test_tracked_and_fresh_files_go_in_the_rest_is_named(checkout):
    (checkout / "fresh.py").write_text("y = 2\n")
    (checkout / "weights.bin").write_bytes(bytes(archive.MAX_BYTES + 1))
    (checkout / "ignored").mkdir()
    (checkout / "ignored" / "secret.txt").write_text("s")
    for name in (".env", "my-credentials.json", "server.key"):
        (checkout / name).write_text("s")
    packed = archive.pack(checkout)
    inside = members(packed)
    assert set(inside) == {".gitignore", "fresh.py", "package/code.py", "run.sh"}
    assert inside["run.sh"].mode == 0o755
    assert {note.split()[0] for note in packed.left_out} == {
        ".env",
        "my-credentials.json",
        "server.key",
        "weights.bin",
    }
    assert "weights.bin (untracked, 1.0 MB)" in packed.summary()


def test_the_name_tells_the_content(checkout):
    first = archive.pack(checkout)
    (checkout / "package" / "code.py").touch()
    assert archive.pack(checkout) == first
    (checkout / "package" / "code.py").write_text("x = 2\n")
    assert archive.pack(checkout).name != first.name


def test_a_deleted_tracked_file_is_no_error(checkout):
    (checkout / "run.sh").unlink()
    assert "run.sh" not in members(archive.pack(checkout))


def test_of_an_installed_wheel_its_files_go_in_as_a_checkout_has_them(tmp_path, monkeypatch):
    share = tmp_path / "share"
    (share / "launch").mkdir(parents=True)
    for name in ("pyproject.toml", "launch/sky.yaml"):
        (share / name).write_text("")
    monkeypatch.setattr(shipped, "TOP", tmp_path / "site-packages")
    monkeypatch.setattr(shipped, "share", lambda: share)
    inside = set(members(archive.pack()))
    assert {"pyproject.toml", "launch/sky.yaml", "prime_jax/shipped.py"} <= inside
    assert not any("__pycache__" in name for name in inside)


def test_it_is_written_once(checkout, tmp_path):
    packed = archive.pack(checkout)
    sweep = engine.sweep_at(tmp_path / "root")
    url = archive.publish(sweep, packed)
    assert archive.publish(sweep, packed) == url
    with open(url, "rb") as file:
        assert file.read() == packed.data


def test_what_cannot_be(checkout, tmp_path):
    with pytest.raises(UserError, match="checkout"):
        archive.pack(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot"):
        archive.publish(engine.sweep_at(blocked), archive.pack(checkout))
