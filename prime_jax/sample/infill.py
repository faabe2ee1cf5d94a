r"""Infilling: `def add(a, b):[[MASK*8]] + b`, and tokens of which some sub-tokens are kept.

    [[MASK]]            one masked token; [[MASK*8]] eight
    [[KEEP:3 word]]     the tokens of `word`, of which the first three sub-tokens are kept and the
                        others sampled again
    [[KEEP:++?+ word]]  the same with a sign for every sub-token: + kept, ? sampled again
    \[[MASK]]           the text [[MASK]]; a backslash before that is written twice

Everything else is fixed, [[MASKED]] too. Sub-token 1 is the most significant digit of
the token's code.
"""

import re

import numpy as np

from prime_jax.data.tokenizers import Tokenizer
from prime_jax.errors import UserError
from prime_jax.subtokens import Codebook

PART = re.compile(r"(?P<slashes>\\*)\[\[(?P<kind>MASK|KEEP)\b(?P<rest>.*?)\]\]", re.DOTALL)
MASK = re.compile(r"(?:\*(\d+))?")
KEEP = re.compile(r":(\d+|[+?]+) (.+)", re.DOTALL)


def canvas(text: str, tokenizer: Tokenizer, codebook: Codebook) -> np.ndarray:
    """Digits int32 [L, S] of a text, `codebook.base` where masked.

    Raises:
        UserError: nothing is masked, or an invalid [[...]].
    """
    parts, holes, plain, at = [], [], "", 0
    for match in PART.finditer(text):
        slashes, hole = match["slashes"], match[0].lstrip("\\")
        plain += text[at : match.start()] + "\\" * (len(slashes) // 2)
        at = match.end()
        if len(slashes) % 2:
            plain += hole
            continue
        parts += [codebook.encode(tokenizer.encode(plain)), _hole(match, hole, tokenizer, codebook)]
        holes.append(hole)
        plain = ""
    parts.append(codebook.encode(tokenizer.encode(plain + text[at:])))
    digits = np.concatenate(parts).astype(np.int32)
    if not (digits == codebook.base).any():
        if holes:
            raise UserError(
                f"{holes[0]} keeps all {codebook.length} sub-tokens: nothing to fill in"
            )
        raise UserError(
            "nothing to fill in: write [[MASK*8]] for eight masked tokens, or [[KEEP:3 word]] to "
            "sample the sub-tokens of a word after the third again"
        )
    return digits


def _hole(match: re.Match, hole: str, tokenizer: Tokenizer, codebook: Codebook) -> np.ndarray:
    rest = match["rest"]
    if match["kind"] == "MASK":
        size = MASK.fullmatch(rest)
        if size is None or size[1] == "0":
            raise UserError(f"{hole}: write [[MASK]] or [[MASK*8]]")
        return np.full((int(size[1] or 1), codebook.length), codebook.base)
    keep = KEEP.fullmatch(rest)
    if keep is None:
        raise UserError(f"{hole}: write [[KEEP:3 word]], or [[KEEP:++? word]] with + and ?")
    digits = codebook.encode(tokenizer.encode(keep[2]))
    return np.where(_kept(hole, keep[1], codebook.length), digits, codebook.base)


def _kept(hole: str, pattern: str, length: int) -> np.ndarray:
    """bool [S]: kept sub-tokens for a pattern like `3` or `++?+`."""
    if pattern.isdigit():
        if int(pattern) > length:
            raise UserError(f"{hole}: a token has {length} sub-tokens")
        return np.arange(length) < int(pattern)
    if len(pattern) != length:
        raise UserError(f"{hole}: {len(pattern)} signs, but a token has {length} sub-tokens")
    return np.array([sign == "+" for sign in pattern])
