"""The two figures of docs/theory.md, and the numbers in them.

docs/figures/theory-enumeration.png: two tokens over V = 16, every sequence and every mask summed,
with a network that knows the source (the tables and sums of tests/test_enumeration.py).
docs/figures/theory-markov.png: trained networks on a Markov source (experiments/bound_demo.py).

    python experiments/bound_demo.py --out runs/bound_demo     # minutes
    python experiments/theory_figures.py [--demo runs/bound_demo/numbers.json]
"""

import argparse
import sys
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from prime_jax.runtime.records import read_json
from prime_jax.scaling.drawing import COLOURS, GREY, STYLE

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import test_enumeration as enumeration  # noqa: E402

CODES = {
    "l1": "l = 1",
    "l2": "l = 2",
    "l2-affine": "l = 2, shuffled",
    "l4": "l = 4",
    "l4-affine": "l = 4, shuffled",
}
STEPS = (1, 2, 4, 8, 16, 32, 64)
RUNS = {
    "arm": "ARM",
    "mdm_blocks": "MDM, blocks of 8",
    "prime_blocks": "Prime, blocks of 2",
    "mdm": "MDM",
    "prime": "Prime, marginal loss",
    "prime_joint": "Prime, joint loss",
}
KINDS = {  # of the demo: name, marker, colour
    "nll": ("exact NLL, chain rule", "D", COLOURS[6]),
    "exact": ("exact NLL, all subsets", "P", COLOURS[4]),
    "nelbo": ("sub-token NELBO", "o", COLOURS[0]),
    "token_nelbo": ("token-mask NELBO", "s", COLOURS[2]),
    "train_loss": ("joint loss, no bound", "X", COLOURS[1]),
}


def enumerated(out: Path) -> None:
    with jax.enable_x64(True):
        floor = enumeration.entropy()
        losses = {name: enumeration.enumerate_losses(name) for name in CODES}
        finite = {name: enumeration.finite_nelbos(name, STEPS) for name in ("l1", "l4")}
    print(f"entropy {floor:.6f} nats per pair")
    print("code              marginal   joint")
    for name, (marginal, joint) in losses.items():
        print(f"{CODES[name]:16s}  {marginal:.6f}   {joint:.6f}")
    print("finite:T, T =", *STEPS)
    for name, values in finite.items():
        print(f"{CODES[name]:16s}", *(f"{value:.4f}" for value in values))

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    y = range(len(CODES))
    for panel, draw in ((left, left.axvline), (right, right.axhline)):
        draw(floor, color=GREY, linestyle="--", linewidth=1)
        panel.set_title("")
    left.scatter(
        [v[0] for v in losses.values()], y, color=COLOURS[0], label="marginal loss", zorder=3
    )
    left.scatter(
        [v[1] for v in losses.values()],
        y,
        color=COLOURS[1],
        marker="X",
        label="joint loss",
        zorder=4,
    )
    left.set_yticks(y, CODES.values())
    left.invert_yaxis()
    left.set_xlabel("nats per pair")
    left.set_title("A network that knows the source", loc="left")
    left.annotate("entropy", (floor, 3.4), xytext=(-4, 0), textcoords="offset points", ha="right")
    left.legend(loc="upper left")
    for (name, values), colour in zip(finite.items(), (COLOURS[0], COLOURS[2]), strict=True):
        right.plot(STEPS, values, "o-", color=colour, markersize=4, label=CODES[name])
    right.set_xscale("log", base=2)
    right.set_xticks(STEPS, STEPS)
    right.set_xlabel("steps T of the sampler")
    right.set_ylabel("finite:T, nats per pair")
    right.set_title("Fewer steps, looser bound", loc="left")
    right.annotate("entropy", (1, floor), xytext=(0, 4), textcoords="offset points")
    right.legend()
    save(figure, out / "theory-enumeration.png")


def markov(numbers: dict, out: Path) -> None:
    floor = numbers["block_entropy"]
    figure, panel = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
    panel.axvline(floor, color=GREY, linestyle="--", linewidth=1)
    shown = {run: title for run, title in RUNS.items() if run in numbers["runs"]}
    for row, (run, title) in enumerate(shown.items()):
        values = numbers["runs"][run]
        for kind, (_, marker, colour) in KINDS.items():
            if kind in values:
                error = 2 * values["se"]
                panel.errorbar(values[kind], row, xerr=error, fmt=marker, color=colour, capsize=2)
        told = ", ".join(f"{k} {values[k]:.4f}" for k in KINDS if k in values)
        print(f"{title:22s} {told}  (se {values['se']:.4f})")
    panel.set_yticks(range(len(shown)), shown.values())
    panel.invert_yaxis()
    panel.set_xlabel("nats per token, two standard errors")
    panel.set_title("Trained networks on a Markov source", loc="left")
    beside = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    panel.annotate("entropy of\na sequence", (floor, 0.5), color=GREY, **beside)
    handles = [
        panel.plot([], [], marker, color=colour, label=label)[0]
        for label, marker, colour in KINDS.values()
    ]
    panel.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
    print(f"entropy of a sequence {floor:.4f} nats per token")
    save(figure, out / "theory-markov.png")


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/bound_demo/numbers.json"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args()
    with plt.rc_context(STYLE):
        enumerated(args.out)
        markov(read_json(args.demo), args.out)


if __name__ == "__main__":
    main()
