"""`prime-jax sample` and `infill` as a person meets them."""

import json

import numpy as np
import pytest

from prime_jax import cli
from prime_jax.data.tokenizers import Bytes
from prime_jax.errors import UserError
from prime_jax.runtime.records import read_json, write_json_atomic
from prime_jax.sample import infill
from prime_jax.subtokens import Codebook


def failing(arguments, capsys) -> str:
    """Run a command that must fail; returns its one line."""
    assert cli.main([str(a) for a in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_samples_are_written_one_object_per_line(tiny_run, tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    command = ["sample", str(tiny_run), "--num", "4", "--prompt", "3 5 ", "-o", str(out)]
    assert cli.main([*command, "--steps", "8", "--batch-size", "2"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert len(line["tokens"]) == 16
        assert line["tokens"][:2] == [3, 5]
        assert line["drawn"] == [[2, 16]]
        assert [int(word) for word in line["text"].split()] == line["tokens"]
    assert len({line["text"] for line in lines}) == 4
    assert "entropy" in capsys.readouterr().err


def test_infill_keeps_what_is_given(tiny_run, tmp_path):
    out = tmp_path / "filled.jsonl"
    text = "3 5 [[MASK*4]]7 [[KEEP:2 9 ]]"
    assert cli.main(["infill", str(tiny_run), text, "-o", str(out), "--steps", "4"]) == 0
    (line,) = [json.loads(row) for row in out.read_text().splitlines()]
    assert len(line["tokens"]) == 8
    assert (line["tokens"][:2], line["tokens"][6]) == ([3, 5], 7)
    assert line["drawn"] == [[2, 6], [7, 8]]


@pytest.mark.slow
def test_a_measured_grid_says_what_it_costs(tiny_run, capsys):
    command = ["sample", str(tiny_run), "--grid", "measured"]
    assert cli.main([*command, "--steps", "4"]) == 0
    told = capsys.readouterr().err
    assert "4 steps: measured grid" in told
    assert "nelbo" in told
    assert cli.main([*command, "--within", "0.5"]) == 0
    assert "steps: measured grid" in capsys.readouterr().err
    assert "must be at least 0" in failing([*command, "--within", "-1.0"], capsys)


@pytest.mark.slow
def test_watching_draws_the_text(tiny_run, capsys):
    assert cli.main(["sample", str(tiny_run), "--steps", "3", "--watch"]) == 0
    assert "100% of 64 sub-tokens" in capsys.readouterr().out


def test_bad_input_is_one_line(tiny_run, tmp_path, capsys):
    run = str(tiny_run)
    assert "--prompt is empty" in failing(["sample", run, "--prompt", ""], capsys)
    assert "context of 16" in failing(["sample", run, "--gen-length", "17"], capsys)
    assert "context of 16" in failing(["infill", run, "3 [[MASK*16]]"], capsys)
    assert "nothing to fill in" in failing(["infill", run, "1 2"], capsys)
    assert "[[MASK*8]]" in failing(["infill", run, "3 [[MASK*x]]"], capsys)
    assert "0 and 15" in failing(["infill", run, "77 [[MASK]]"], capsys)
    assert "--order sideways: must be one of ancestral" in failing(
        ["sample", run, "--order", "sideways"], capsys
    )
    assert "--grid square: must be one of" in failing(["sample", run, "--grid", "square"], capsys)
    assert "--num 0" in failing(["sample", run, "--num", "0"], capsys)
    assert "needs --grid measured" in failing(["sample", run, "--within", "0.1"], capsys)
    assert "no EOS" in failing(["sample", run, "--stop-at-eos"], capsys)
    assert "cannot write" in failing(["sample", run, "-o", tmp_path / "no" / "where"], capsys)
    assert "no run here" in failing(["sample", tmp_path], capsys)
    write_json_atomic(tmp_path / "config.json", read_json(tiny_run / "config.json"))
    assert "train it first" in failing(["sample", tmp_path], capsys)


BOOK = Codebook(9, 2, np.random.default_rng(0).permutation(512)[:257])


def test_holes_hide_tokens_and_keep_subtokens():
    canvas = infill.canvas("a[[MASK*2]]b[[KEEP:4 xy]][[MASK]][[KEEP:+?+?+?+?+ z]]\n", Bytes(), BOOK)
    hidden = canvas == 2
    ids = [ord(c) for c in "a  bxy z\n"]
    assert hidden.sum(axis=1).tolist() == [0, 9, 9, 0, 5, 5, 9, 4, 0]
    assert (canvas == BOOK.digits[ids])[~hidden].all()
    assert not hidden[4, :4].any()


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("[[MASKED]] [[KEEPALIVE]]", "[[MASKED]] [[KEEPALIVE]]"),
        (r"\[[MASK]] \[[KEEP:3 x]]", "[[MASK]] [[KEEP:3 x]]"),
        (r"a\\[[MASK]] [[wiki]]", None),
        (r"\\\[[MASK*3]]\n", r"\[[MASK*3]]\n"),
    ],
)
def test_text_that_looks_like_a_hole_can_be_written(text, plain):
    canvas = infill.canvas(text + "[[MASK]]", Bytes(), BOOK)
    if plain is None:  # a backslash, and a hole
        assert canvas[1].tolist() == BOOK.digits[ord("\\")].tolist()
        assert (canvas[2] == 2).all()
    else:
        assert (canvas[:-1] == BOOK.digits[[*plain.encode()]]).all()
        assert (canvas[-1] == 2).all()


def test_a_hole_that_keeps_all_is_named():
    with pytest.raises(UserError, match=r"\[\[KEEP:9 cat\]\] keeps all 9 sub-tokens"):
        infill.canvas("the [[KEEP:9 cat]] sat", Bytes(), BOOK)


@pytest.mark.parametrize(
    "hole", ["[[MASK*0]]", "[[MASK 3]]", "[[KEEP:10 a]]", "[[KEEP:++ a]]", "[[KEEP:3]]", "[[KEEP]]"]
)
def test_holes_that_cannot_be_read_are_named(hole):
    with pytest.raises(UserError) as error:
        infill.canvas(f"a{hole}b", Bytes(), BOOK)
    assert hole in str(error.value)
