"""The one declaration: types, ranges, strict reading, and errors that say what would be right."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest

from prime_jax import settings
from prime_jax.config import OptimConfig, RunConfig
from prime_jax.errors import UserError
from prime_jax.experiment import load_config
from prime_jax.settings import REQUIRED, Checked, from_dict, set_path, setting, to_dict


def test_configs_round_trip_and_refuse_what_they_do_not_know():
    config = dataclasses.replace(RunConfig(), seed=5)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    for bad, message in [
        ({"modle": {}}, "did you mean model"),
        ({"model": {"width": "64"}}, "model.width = '64': must be an integer"),
        ({"model": {"tied_head": 1}}, "model.tied_head = 1: must be True or False"),
        ({"seed": True}, "seed = True: must be an integer"),
        ({"family": "gpt"}, "family = 'gpt': must be one of arm, mdm, prime"),
        ({"model": 3}, "must be a ModelConfig, or an object with its fields"),
    ]:
        with pytest.raises(UserError) as error:
            from_dict(RunConfig, bad)
        assert message in str(error.value)


def test_retired_settings_of_stored_runs_are_passed_over_at_their_default():
    assert from_dict(RunConfig, {"kernels": {"head_skip": False}}) == RunConfig()
    with pytest.raises(UserError, match=r"^kernels.head_skip = True: a retired setting"):
        from_dict(RunConfig, {"kernels": {"head_skip": True}})
    with pytest.raises(UserError, match="no such setting"):
        from_dict(RunConfig, {"model": {"head_skip": False}})


OUT_OF_RANGE = {
    "steps": [0, -1],
    "batch_size": [0],
    "seed": [-1, 2**32],
    "model.vocab_size": [0],
    "model.layers": [0],
    "model.width": [0, -64],
    "model.heads": [0],
    "model.kv_heads": [-1],
    "model.ffn_multiple": [0],
    "model.ffn_width": [-1],
    "model.dropout": [-0.1, 1],
    "model.rope_base": [0],
    "model.norm_eps": [0, "nan"],
    "model.init_std": [-0.02, "inf"],
    "subtokens.length": [0, 33],
    "subtokens.shuffle": [-0.5, 2],
    "subtokens.seed": [-1],
    "objective.power": [0],
    "objective.sigma_min": [0],
    "objective.sigma_max": [-1],
    "objective.time_eps": [0, 1],
    "objective.times_sd": [0.1, 0.0, "nan"],
    "objective.token_mask_rho": [2],
    "objective.random_length": [-1],
    "objective.block_length": [-4],
    "objective.time_steps": [-1],
    "data.seq_len": [0],
    "data.unique_tokens": [-1],
    "optim.peak_lr": [0, "nan", "inf"],
    "optim.final_lr_fraction": [-1, 1.5],
    "optim.warmup_steps": [-3],
    "optim.cooldown_fraction": [2],
    "optim.b1": [2, 1, -0.1],
    "optim.b2": [1],
    "optim.eps": [0],
    "optim.weight_decay": [-0.1],
    "optim.clip": [-1],
    "optim.ema": [1],
    "optim.base.layers": [-1],
    "optim.base.width": [-64],
    "optim.base.heads": [-1],
    "optim.base.ffn_multiple": [0],
    "eval.examples": [-1],
    "eval.replicates": [0],
    "eval.every": [-1],
    "eval.batch_size": [0],
    "mesh.replica": [-1],
    "mesh.data": [-2],
    "mesh.model": [-1],
    "mesh.accumulate": [0],
    "kernels.head_blocks": [0],
    "kernels.attention_blocks": [-128],
    "checkpoint.every": [-1],
    "checkpoint.minutes": [-1],
    "checkpoint.keep": [0],
    "checkpoint.keep_every": [-1],
    "checkpoint.grace_seconds": [-1],
    "log.every": [0],
    "log.profile": [-5],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_out_of_range_are_told_with_what_is_allowed(name):
    for value in OUT_OF_RANGE[name]:
        words = float(value) if isinstance(value, str) else value
        words = (words,) if name.endswith("_blocks") else words
        with pytest.raises(UserError, match=rf"^{re.escape(name)} = \S+: must be \w+") as caught:
            set_path(RunConfig(), name, words)
        assert "\n" not in str(caught.value)


def test_every_setting_says_what_it_is_for_and_every_number_has_a_range():
    def declared(cls, prefix=""):
        for field in dataclasses.fields(cls):
            assert field.metadata["help"], field.name
            hint = settings.hints(cls)[field.name]
            if dataclasses.is_dataclass(hint):
                yield from declared(hint, f"{prefix}{field.name}.")
            elif hint in (int, float, tuple[int, ...]):
                assert field.metadata["limits"], field.name
                yield prefix + field.name

    assert sorted(declared(RunConfig)) == sorted(OUT_OF_RANGE)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("RunConfig(family='foo')", "family = 'foo': must be one of arm, mdm, prime"),
        (
            "RunConfig(model=ModelConfig(embedding='foo'))",
            "model.embedding = 'foo': must be one of cat_shared, cat, sum",
        ),
        (
            "RunConfig(model=ModelConfig(width='64'))",
            "model.width = '64': must be an integer, at least 1",
        ),
        (
            "RunConfig(optim=OptimConfig(schedule='foo'))",
            "optim.schedule = 'foo': must be one of cosine, wsd",
        ),
        (
            "RunConfig(objective=ObjectiveConfig(weight='foo'))",
            "objective.weight = 'foo': must be one of nelbo, flat",
        ),
        (
            "RunConfig(objective=ObjectiveConfig(loss='foo'))",
            "objective.loss = 'foo': must be one of marginal, joint",
        ),
        ("RunConfig(steps=3.5)", "steps = 3.5: must be an integer, at least 1"),
        ("RunConfig(model=3)", "model = 3: must be a ModelConfig"),
        (
            "RunConfig(stepz=3)",
            "RunConfig(stepz=...): no such setting; did you mean steps?",
        ),
        ("ModelConfig(widht=3)", "ModelConfig(widht=...): no such setting; did you mean width?"),
        ("replace(RunConfig(), stepz=3)", "RunConfig(stepz=...): no such setting; did you mean st"),
    ],
)
def test_what_a_file_builds_is_checked(tmp_path, made, says):
    path = tmp_path / "mine.py"
    names = "ModelConfig, ObjectiveConfig, OptimConfig, RunConfig"
    imports = f"from dataclasses import replace\nfrom prime_jax.config import {names}\n"
    path.write_text(f"{imports}def config():\n    return {made}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path} line 4: {says}")


@dataclasses.dataclass(frozen=True)
class Every(Checked, path="every"):
    """A setting of every type."""

    whole: int = setting(REQUIRED, "required", at_least=2, at_most=9)
    real: float = setting(1.0, "a number", above=0)
    maybe: float | None = setting(None, "a number or nothing", below=1)
    choice: Literal["a", "b"] = setting("a", "one of two")
    pair: tuple[int, str] = setting((1, "x"), "two things")
    many: tuple[float, ...] = setting((), "numbers", at_least=0)
    named: Mapping[str, Sequence[int]] = setting(dict, "lists by name")
    rule: str | Callable[..., Any] = setting("x", "a name or a function", takes="a rule")
    limit: float = setting(1.0, "may be infinite", infinite=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"whole": 1}, "every.whole = 1: must be between 2 and 9"),
        ({"whole": True}, "every.whole = True: must be an integer, between 2 and 9"),
        ({"real": math.nan}, "every.real = nan: must be finite and above 0"),
        ({"real": math.inf}, "every.real = inf: must be finite and above 0"),
        ({"real": 10**400}, "every.real = 1000"),
        ({"maybe": 1}, "every.maybe = 1.0: must be below 1"),
        ({"maybe": "x"}, "every.maybe = 'x': must be a number, below 1"),
        ({"choice": "c"}, "every.choice = 'c': must be one of a, b"),
        ({"pair": (1,)}, "every.pair = (1,): must be"),
        ({"many": [0, -1]}, "every.many = -1.0: must be at least 0"),
        ({"many": 3}, "every.many = 3: must be numbers, each at least 0"),
        ({"named": {"x": ["y"]}}, "every.named = {'x': ['y']}: must be"),
        ({"rule": 3}, "every.rule = 3: must be a rule"),
        ({"limit": math.nan}, "every.limit = nan: must be a finite number"),
    ],
)
def test_values_are_held_against_type_and_range(changes, says):
    with pytest.raises(UserError) as caught:
        Every(**{"whole": 2} | changes)
    assert str(caught.value).startswith(says)
    assert len(str(caught.value)) < 200


def test_values_take_the_form_of_their_type():
    made = Every(3, real=2, many=[1, 2], named={"x": [1]}, rule=len, limit=math.inf)
    assert (made.real, made.many, made.named) == (2.0, (1.0, 2.0), {"x": (1,)})
    assert type(made.real) is float
    assert OptimConfig(clip=1) == OptimConfig(clip=1.0)


def test_missing_and_misspelt_keys():
    with pytest.raises(UserError, match=r"^file\.json: missing whole$"):
        from_dict(Every, {}, "file.json")
    with pytest.raises(UserError, match=r"^real_: no such setting; did you mean real"):
        from_dict(Every, {"real_": 1})
    for path, says in [
        ("model.widht", r"model.widht: no such setting; did you mean width\?"),
        ("modle.width", r"modle.width: no such setting; did you mean model\?"),
        ("steps.x", "steps.x: steps is one value, without settings inside"),
    ]:
        with pytest.raises(UserError, match=says):
            set_path(RunConfig(), path, 3)
