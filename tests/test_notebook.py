"""The tour runs from its first cell to its last."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[1] / "notebooks" / "tour.ipynb"
ROOT = str(TOUR.parents[1])


def execute(directory, seconds):
    notebook = nbformat.read(TOUR, as_version=4)
    client = NotebookClient(
        notebook, timeout=seconds, resources={"metadata": {"path": str(directory)}}
    )
    return client.execute()


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's own machinery
def test_the_short_tour(tmp_path, monkeypatch, environment):
    monkeypatch.setenv("PRIME_JAX_TOUR", "short")
    done = execute(tmp_path, 300)
    assert any(cell.get("outputs") for cell in done.cells)
    assert (tmp_path / "sweep" / "fit" / "report.html").exists()
    assert (tmp_path / "exported" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_whole_tour(tmp_path, monkeypatch, environment):
    monkeypatch.delenv("PRIME_JAX_TOUR", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # a model is trained, not only compiled
    execute(tmp_path, 1800)


def test_stored_outputs_are_small():
    assert TOUR.stat().st_size < 400_000
