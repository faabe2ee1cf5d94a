"""Samples of block diffusion: their law, and what they do not depend on."""

from functools import lru_cache
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats
from test_block_diffusion import decoded_log_prob, network, tiny_run

from prime_jax.errors import UserError
from prime_jax.sample import Options, Sampler
from prime_jax.sample.block_diffusion import options_of
from prime_jax.settings import set_path


@lru_cache
def sampler(config, devices: int = 1) -> Sampler:
    apply, params, book = network(config)

    def bound(params):
        return lambda *args, **more: apply(params, *args, **more)

    run = SimpleNamespace(config=config, codebook=book, params=params, network=bound)
    return Sampler(run, jax.devices()[:devices])


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 4])
def test_blocks_of_one_token_in_one_step_are_drawn_from_the_chain_rule(length):
    """Chi-square against the probability of all 25 texts of two tokens."""
    config = set_path(tiny_run(1, length, vocab_size=5), "data.seq_len", 2)
    tokens = np.stack(np.meshgrid(np.arange(5), np.arange(5), indexing="ij"), -1).reshape(-1, 2)
    law = np.exp(decoded_log_prob(config, tokens))
    draw = sampler(config)
    drawn = draw.sample([draw.canvas([])] * 4096, Options(steps=2, batch_size=4096)).tokens
    seen = np.bincount(np.array(drawn) @ [5, 1], minlength=25)
    rare = law * 4096 < 5
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (seen, law / law.sum() * 4096)]
    assert stats.chisquare(*[x[pooled[1] > 0] for x in pooled]).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ancestral", "confidence"])
def test_examples_do_not_depend_on_their_batch_or_on_what_is_cut_off(order):
    draw = sampler(tiny_run(4), devices=2)
    canvases = [draw.canvas(prompt) for prompt in ([], [1, 2, 3, 4, 5, 6], [7])]
    options = Options(steps=8, order=order)
    whole = draw.sample(canvases, options).tokens
    assert whole[1][:6].tolist() == [1, 2, 3, 4, 5, 6]  # it ends inside a block
    assert min(tokens.min() for tokens in whole) >= 0  # no sub-tokens that are no token
    for i, canvas in enumerate(canvases):
        alone = draw.sample([canvas], options, first=i).tokens[0]
        np.testing.assert_array_equal(whole[i], alone)
    assert (whole[0] != whole[2]).any()


@pytest.mark.slow
def test_the_cache_changes_no_sample():
    """The whole text so far through the same network, all of a block at once."""
    config = tiny_run(4)
    apply, params, book = network(config)
    draw = sampler(config)
    canvas = draw.canvas([3])
    options = Options(order="confidence", temperature=0.0, steps=2)
    calls = []
    got = draw.sample([canvas[:7]], options, lambda digits, count: calls.append(count))
    digits = canvas[None].copy()
    for start in (0, 4):
        h, head_VxD = apply(params, digits)
        best = np.asarray(h[0, start : start + 4] @ head_VxD.T).argmax(axis=-1)
        new = np.where(np.arange(start, start + 4) == 0, 3, book.tokens[best])
        digits[0, start : start + 4] = book.digits[new]
    np.testing.assert_array_equal(got.tokens[0], book.decode(digits)[0, :7])
    assert got.calls == [2]
    assert calls == [1, 2]  # --watch shows a text after every call


def test_options_that_do_not_go_with_blocks_are_refused():
    config = tiny_run(4)
    for options, told in ((Options(block_length=3), "blocks of 4"), (Options(cfg_scale=1), "cfg")):
        with pytest.raises(UserError, match=told):
            options_of(config, options)
    assert options_of(config, Options()).block_length == 4
    assert options_of(tiny_run(0), Options()) == Options()
