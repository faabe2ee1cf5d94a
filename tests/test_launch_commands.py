"""`sweep up|down|render` as a user types them: what is refused, in one line, and what is written."""

import io
import os
from dataclasses import fields

import fake_trainer
import pytest

from prime_jax import cli
from prime_jax.cli import launch as commands
from prime_jax.errors import UserError
from prime_jax.launch import engine
from prime_jax.sweep import state


@pytest.fixture
def root(tmp_path):
    fake_trainer.planned(tmp_path / "sweep")
    return str(tmp_path / "sweep")


def refused(capsys, *words: str) -> str:
    assert cli.main(["sweep", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_unknown_engines_slices_and_options_of_others(root, capsys):
    assert ", ".join(commands.ENGINES) in refused(capsys, "up", root, "--on", "aws")
    assert "here: prime-jax sweep run ROOT --workers N" in refused(
        capsys, "up", root, "--on", "local"
    )
    assert "no such chip" in refused(capsys, "up", root, "--on", "slurm", "--slice", "v9-4")
    assert "--zone: not an option of --on slurm" in refused(
        capsys, "up", root, "--on", "slurm", "--zone", "z"
    )
    assert "at least 1" in refused(capsys, "up", root, "--on", "slurm", "--workers", "0")


def test_who_cannot_answer_is_told_of_yes(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="--yes"):
        commands._ask("submit?")


def test_a_root_that_is_no_sweep(tmp_path, capsys):
    for name in commands.ENGINES:
        words = ("--image", "i") if name == "k8s" else ()
        line = refused(capsys, "render", str(tmp_path / "nothing"), "--on", name, *words)
        assert "no sweep here" in line or "ROOT must be" in line


def test_what_is_only_rendered(root, capsys):
    assert "sweep render ROOT --on k8s" in refused(capsys, "up", root, "--on", "k8s")
    assert "sky jobs launch" in refused(capsys, "up", root, "--on", "sky")
    assert "only rendered" in refused(capsys, "down", root, "--on", "k8s")


def test_an_sbatch_that_names_no_job(root, capsys, monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    for name, words in (("sbatch", "queued: 4711"), ("squeue", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {words}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    line = refused(capsys, "up", root, "--on", "slurm", "--yes")
    assert "queued: 4711" in line
    assert "squeue says whether" in line


def test_no_slurm_here(root, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for command in ("up", "down"):
        assert "no Slurm on this machine" in refused(
            capsys, command, root, "--on", "slurm", "--yes"
        )


def test_a_missing_library_is_one_line_with_the_command(root, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit.slurm.slurm", None)
    assert "pip install 'prime_jax[slurm]'" in refused(capsys, "render", root, "--on", "slurm")


def test_render_prints_or_writes(root, capsys, tmp_path):
    pytest.importorskip("submitit", reason="pip install 'prime_jax[slurm]'")
    words = ["sweep", "render", root, "--on", "slurm", "--slice", "h100-8"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#!/bin/bash")
    assert cli.main([*words, "-o", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").glob("*.sbatch")
    assert path.read_text() == printed
    for run in state.open_runs(tmp_path / "sweep"):
        state.publish(tmp_path / "sweep", run.id, {"status": "done", "losses": []})
    assert "every run has ended" in refused(capsys, *words[1:])


def test_options_mean_the_same_wherever_they_appear():
    """One flag has one type; --help has the words of every engine that means something else."""
    seen: dict[str, object] = {}
    told = {one.name: one.metadata["help"] for one in fields(commands.EngineOptions)}
    for module in commands.ENGINES.values():
        for one in fields(module.Options):
            assert seen.setdefault(one.name, one.type) == one.type
            assert one.metadata["help"] in told[one.name]


def test_names_tell_sweeps_apart_and_stay_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert engine.sweep_at("a").name == engine.sweep_at(tmp_path / "a/").name
    assert engine.sweep_at("a").name != engine.sweep_at("b").name
    assert engine.sweep_at("gs://b/a/").name == engine.sweep_at("gs://b/a").name
