"""Files shown in docs/ are what `sweep render` prints. `make docs` runs this file to renew them."""

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import fake_trainer
import pytest

from prime_jax.hardware import slices
from prime_jax.launch import engine, gce, k8s, sky, slurm, tpu

DOCS = engine.REPO / "docs"
MARK = "<!-- {} is rendered by `make docs` -->"
BUCKET = "gs://my-project-sweeps"
PAGES = {
    "gce.md": ("resources",),
    "tpu-vm.md": ("request", "startup"),
    "slurm.md": ("slurm",),
    "gke.md": ("nodes", "k8s", "sky"),
}
LANGUAGES = {
    **dict.fromkeys(("resources", "request"), "json"),
    **dict.fromkeys(("startup", "nodes", "slurm"), "bash"),
    **dict.fromkeys(("k8s", "sky"), "yaml"),
}


def rendered(folder: Path) -> dict[str, str]:
    """What the pages show, by name."""
    base = fake_trainer.BASE
    data = replace(base.data, path="/home/me/prime_jax/data/c4")
    fake_trainer.planned(folder / "sweep", base=replace(base, data=data))
    sweep = engine.Sweep(f"{BUCKET}/c4", folder / "sweep", 4, slices.parse("v5e-16"))
    shared = replace(sweep, root="/shared/c4", workers=8, only=slices.parse("h100-8"))
    worker, source = "prime-worker", f"{BUCKET}/data"
    machines = {
        "project": "my-project",
        "zone": "europe-west4-b",
        "spot": True,
        "service_account": f"{worker}@my-project.iam.gserviceaccount.com",
        "data": source,
    }
    newer = replace(sweep, only=slices.parse("tpu7x-128"), workers=1)
    image = "europe-west4-docker.pkg.dev/my-project/prime/prime_jax:1"
    pods = k8s.Options(image, queue="tpus", spot=True, service_account=worker, data=source)
    script, request = tpu.render(sweep, tpu.Options(**machines)).values()
    _, resources = gce.render(newer, gce.Options(**machines | {"zone": "us-central1-c"})).values()
    (batch,) = slurm.render(shared, slurm.Options(partition="gpu", time=480)).values()
    *_, sets = k8s.render(replace(sweep, workers=1), pods).values()
    nodes, *_ = k8s.render(newer, pods).values()
    (task,) = sky.render(sweep, sky.Options(spot=True, data=source)).values()
    texts = {"request": request, "slurm": batch, "k8s": sets, "sky": task}
    texts |= {"resources": resources, "nodes": nodes}
    texts["startup"] = script.partition("# shellcheck")[0]
    code = re.compile(r"code-[0-9a-f]{12}")
    return {
        name: code.sub("code-0123456789ab", text)
        .replace(sys.executable, "/shared/prime_jax/.venv/bin/python")
        .strip()
        for name, text in texts.items()
    }


def renew(page: str, texts: dict[str, str]) -> str:
    """A page with its rendered blocks replaced."""
    for name in texts:
        block = f"{MARK.format(name)}\n```{LANGUAGES[name]}\n{texts[name]}\n```\n"
        pattern = rf"{re.escape(MARK.format(name))}\n(```.*?\n```\n)?"
        page = re.sub(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
    return page


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    pytest.importorskip("submitit", reason="pip install 'prime_jax[slurm]'")
    return rendered(tmp_path_factory.mktemp("docs"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_what_is_rendered(name, texts):
    page = (DOCS / name).read_text()
    for part in PAGES[name]:
        assert MARK.format(part) in page
    assert renew(page, texts) == page, "run: make docs"


@pytest.mark.parametrize("name", PAGES)
def test_commands_on_a_page_exist(name, monkeypatch):
    """Every prime-jax line of a page parses."""
    from prime_jax import cli
    from prime_jax.runtime import storage

    monkeypatch.setattr(storage, "_filesystem", lambda protocol: None)  # no client of gs://
    text = (DOCS / name).read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [
        line for block in blocks for line in block.splitlines() if line.startswith("prime-jax")
    ]
    assert lines
    names = "\n".join(re.findall(r"^export .*$", text, re.MULTILINE))
    for line in lines:
        shell = ["bash", "-c", f"{names}\nprintf '%s\\n' {line}"]
        words = subprocess.run(shell, capture_output=True, text=True, check=True, cwd=engine.REPO)
        cli.parsed(words.stdout.splitlines()[1:])


def test_xpks_one_liner():
    import shutil

    if not shutil.which("xpk"):
        pytest.skip("xpk is not installed")
    (line,) = re.findall(r"^xpk workload create .*$", (DOCS / "gke.md").read_text(), re.MULTILINE)
    done = subprocess.run(["bash", "-c", f"{line} --dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        fresh = rendered(Path(folder))
    for name in PAGES:
        (DOCS / name).write_text(renew((DOCS / name).read_text(), fresh))
