"""What a move of the code must leave as it is: numbers, ids, rendered files, an older sweep.

Reaches the product through the command line and `prime_jax.config`; whatever knows the schema of
its JSON is in `net/reading.py`. Stored numbers hold to 2e-5, with PRIME_NET_EXACT=1 to the last bit
(on the machine that made them). `python tests/net/make.py` makes them again.
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import fake_store
import pytest

from prime_jax import cli
from prime_jax import config as configs
from prime_jax.train import train

HERE = Path(__file__).parent / "net"
sys.path.insert(0, str(HERE))
import cases  # noqa: E402
import reading  # noqa: E402

NUMBERS = HERE / "numbers.json"
EXACT, WRITE = (os.environ.get(f"PRIME_NET_{name}") == "1" for name in ("EXACT", "WRITE"))
TOLERANCE, NOUGHT = 2e-5, 1e-9  # relative; and where numbers are noise about zero
ESTIMATORS = ("subtoken", "token", "finite:4", "chain:l2r")
RENDERS = {
    "slurm": ("--slice", "h100-8", "--time", "60", "--setup", "module load cuda"),
    "tpu": ("--slice", "v5e-16", "--project", "p", "--zone", "z", "--data", "gs://bucket/data"),
    "gce": ("--slice", "tpu7x-16", "--project", "p", "--zone", "a-b-c", "--data", "gs://bucket/d"),
    "k8s": ("--slice", "v5e-16", "--image", "registry/i", "--data", "gs://bucket/data", "--spot"),
    "sky": ("--slice", "2xh100-8", "--data", "gs://bucket/data", "--spot"),
}


def prime_jax(*words, code: int = 0) -> str:
    """What a command prints; it must end with `code`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it; narrow tables fold
        assert cli.main([str(word) for word in words]) == code, out.getvalue()
    return out.getvalue()


# --- stored numbers


def differences(found: dict, stored: dict, exact: bool = EXACT) -> list[str]:
    """Where two flat dicts of numbers, or lists of them, are not the same."""
    names = sorted(found.keys() | stored.keys())
    return [
        f"{name}: {found.get(name, 'missing')}, stored {stored.get(name, 'nothing')}"
        for name in names
        if not (name in found and name in stored and _same(found[name], stored[name], exact))
    ]


def _same(a, b, exact: bool) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y, exact) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float) and not exact:
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=NOUGHT)
    return type(a) is type(b) and a == b


def check(section: str, found: dict) -> None:
    """Compare with the stored section, or store it."""
    found = json.loads(json.dumps(found))
    if WRITE:
        stored = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
        NUMBERS.write_text(_readable(stored | {section: found}))
    assert differences(found, json.loads(NUMBERS.read_text())[section]) == []


def check_text(path: Path, found: str) -> None:
    if WRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert path.exists(), "nothing is stored: PRIME_NET_WRITE=1 with this test alone stores it"
    assert found == path.read_text()


def _readable(sections: dict) -> str:
    """JSON with a line for each name."""
    parts = []
    for section, values in sorted(sections.items()):
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()]
        parts.append(f" {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def changed(value):
    """A value that is off by a little."""
    if isinstance(value, list):
        return [*value[:-1], changed(value[-1])] if value else [1]
    if isinstance(value, bool) or value is None:
        return "other"
    return value + "x" if isinstance(value, str) else value * (1 + 10 * TOLERANCE) + 2 * NOUGHT


# --- training and evaluation


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """`trained(name)` is the directory of a run of 12 steps with checkpoints after 5 and 10."""
    made = {}

    def of(name: str) -> tuple[configs.RunConfig, Path]:
        if name not in made:
            config = cases.variant(tiny, name)
            made[name] = config, tmp_path_factory.mktemp("net") / name
            train(*made[name], log=lambda _: None)
        return made[name]

    return of


@pytest.mark.parametrize(
    "name",
    [  # mdm is prime with one sub-token, by the same code
        pytest.param(name, marks=pytest.mark.slow if name in ("mdm", "blocks") else ())
        for name in cases.VARIANTS
    ],
)
def test_losses_of_training_also_when_it_goes_on_from_the_middle(name, trained, tmp_path):
    config, run_dir = trained(name)
    found = reading.training(run_dir)
    assert len(found["loss"]) == config.steps
    check(f"training {name}", found)
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if not path.name.startswith("000000005"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = []
    train(config, tmp_path / "run", log=said.append)
    assert any("at step 5 of 12" in line for line in said)
    assert reading.training(tmp_path / "run") == found


@pytest.mark.slow
def test_one_number_of_each_estimator(trained, tmp_path):
    _, run_dir = trained("prime")
    options = ("--replicates", 4, "--examples", 8, "--devices", 1, "--out", tmp_path / "e.json")
    prime_jax("eval", run_dir, "--estimators", ",".join(ESTIMATORS), *options)
    found = reading.evaluation(tmp_path / "e.json")
    assert {f"{name}.value" for name in ESTIMATORS} <= set(found)
    check("estimators", found)


# --- names


def test_run_ids():
    check("run ids", {name: configs.run_id(run) for name, run in cases.CONFIGS.items()})


@pytest.mark.parametrize("name", cases.PRESETS)
def test_plans_of_the_experiments(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no data is prepared here
    check(f"plan {name}", reading.plan(prime_jax("sweep", "plan", f"preset:{name}")))


# --- scaling laws


@pytest.fixture(scope="module")
def no_pictures():
    """Figures are empty files: drawing takes longer than all of the numbers."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw_without_rendering", lambda *_: None)
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_text("<svg/>"))
        yield


@pytest.fixture(scope="module")
def fitted(no_pictures, tmp_path_factory):
    """The directory of a fit, all three approaches, of the table of two families."""
    folder = tmp_path_factory.mktemp("net-fit")
    rows = cases.read(cases.TABLE)
    curves = cases.write(folder / "curves.csv", cases.curves(rows))
    options = ("--curves", curves, "--out", folder / "fit", *cases.BOOTSTRAP)
    prime_jax("fit", cases.TABLE, *options)
    return folder / "fit"


def test_numbers_of_a_fit(fitted):
    check("fit", reading.fit(fitted / "fit.json"))


def test_numbers_of_predictions(fitted):
    said = prime_jax("scaling", "predict", fitted, "--flops", "1e21", "--json")
    check("predict", reading.predictions(said))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("command", ["compare", "validate"])
def test_numbers_of_the_published_table(command, tmp_path):
    table = cases.write(tmp_path / "published.csv", cases.published())
    options = ("--baseline", "arm", "--allow-mixed-kinds") if command == "compare" else ()
    prime_jax("scaling", command, table, "--out", tmp_path, *cases.BOOTSTRAP, *options)
    check(command, getattr(reading, command)(tmp_path / f"{command}.json"))


# --- a sweep that an older version wrote


@pytest.fixture
def data(markov_data, tmp_path):
    """`markov_data` in a folder beside which others can be made."""
    (tmp_path / "data").symlink_to(markov_data)
    return tmp_path / "data"


@pytest.fixture
def sweep(data, tmp_path):
    """A copy of the stored sweep that reads `data`."""
    return cases.unpack(tmp_path / "sweep", str(data))


def collected(root: Path) -> dict:
    prime_jax("sweep", "collect", root, "-o", root.parent / "runs.csv")
    with (root.parent / "runs.csv").open(newline="") as file:
        return reading.table(list(csv.DictReader(file)))


def hidden(found: dict, data: Path) -> dict:
    """Without the folder of the data, which every session makes anew."""
    return json.loads(json.dumps(found).replace(str(data), cases.DATA))


def test_an_older_sweep_is_read(sweep, data):
    known = {config["data"]["fingerprint"] for config in cases.configs_of(sweep)}
    assert known == {json.loads((data / "manifest.json").read_text())["fingerprint"]}
    for config in cases.configs_of(sweep):
        again = configs.from_dict(configs.RunConfig, config)
        assert (sweep / "state" / f"{configs.run_id(again)}.spec").exists()
    status = reading.status(prime_jax("sweep", "status", sweep, "--json"))
    check("sweep status", hidden(status, data))
    check("sweep table", hidden(collected(sweep), data))
    prime_jax("sweep", "status", sweep)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_an_older_sweep_is_fitted(sweep):
    """One family has a law, barely; the others are refused."""
    prime_jax("fit", sweep, *cases.BOOTSTRAP, code=3)
    found = reading.fit(sweep / "fit" / "fit.json")
    spread = (".low", ".high", ".bounds", ".agreeing")  # so few runs do not hold these
    check("sweep fit", {k: v for k, v in found.items() if not k.endswith(spread)})


def test_an_older_sweep_goes_on_and_grows(sweep, data, tmp_path):
    before = {path.name: path.read_bytes() for path in (sweep / "state").iterdir()}
    (there,) = [c for c in cases.configs_of(sweep) if c["seed"] == cases.OPEN["seed"]]
    with cases.own_compilation_cache():
        prime_jax("sweep", "run", sweep, code=1)  # one has failed, and waits for `retry`
    after = collected(sweep)
    check("sweep continued", hidden(after, data))
    opened = configs.run_id(configs.from_dict(configs.RunConfig, there))
    assert after[f"{opened}.status"] == "done"
    (tmp_path / "data-gone").symlink_to(data)  # a plan asks for the data of every row
    rows = [*cases.rows(str(data)), cases.OPEN, cases.ADDED]
    path = tmp_path / "more.json"
    path.write_text(json.dumps([cases.row(one, str(data)) for one in rows]))
    prime_jax("sweep", "plan", path, sweep)
    now = {path.name: path.read_bytes() for path in (sweep / "state").iterdir()}
    new = {name for name in now.keys() - before.keys() if name.endswith(".spec")}
    assert len(new) == 1
    assert {name: now[name] for name in before} == before, "what was there stays as it was"
    check("sweep added", {"run": new.pop().removesuffix(".spec")})
    status = reading.status(prime_jax("sweep", "status", sweep, "--json"))
    (failed,) = {k.partition(".")[0] for k, v in status.items() if v == "failed"}
    prime_jax("sweep", "retry", sweep, failed)
    status = reading.status(prime_jax("sweep", "status", sweep, "--json"))
    assert status[f"{failed}.status"] == "pending"


@pytest.mark.parametrize("engine", RENDERS)
def test_what_engines_would_be_sent(engine, tmp_path, monkeypatch):
    if engine == "slurm":
        pytest.importorskip("submitit", reason="pip install 'prime_jax[slurm]'")
    monkeypatch.setenv("HOME", "/home/somebody")
    root = cases.unpack(tmp_path / "sweep", "/data/markov")
    with fake_store.bucket("gs") as bucket:
        for path in (p for p in root.rglob("*") if p.is_file()):
            bucket.store.put("bucket", f"here/{path.relative_to(root)}", path.read_bytes())
        words = ("sweep", "render", bucket.url, "--on", engine, "--workers", 2, *RENDERS[engine])
        text = prime_jax(*words)
    text = text.replace(sys.executable, "<python>").replace("/home/somebody", "<home>")
    text = re.sub(r"code-[0-9a-f]{12}", "code-<hash>", text)  # of this checkout
    check_text(HERE / "renders" / f"{engine}.txt", text)


# --- the comparison itself, last: with PRIME_NET_WRITE there are numbers by now


def test_any_change_is_seen():
    for values in json.loads(NUMBERS.read_text()).values():
        for name, value in values.items():
            assert differences(values, values, exact=True) == []
            assert len(differences(values | {name: changed(value)}, values, exact=False)) == 1
            assert len(differences({k: v for k, v in values.items() if k != name}, values)) == 1
    assert differences({"x": 1.0}, {"x": 1.0 + 1e-6}, exact=False) == []
    assert differences({"x": 1.0}, {"x": math.nextafter(1.0, 2)}, exact=True)
