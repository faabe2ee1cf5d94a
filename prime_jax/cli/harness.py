"""The model as lm-eval's own command makes it: `--model_args run=RUN`, where RUN is also ROOT:ID.

The command finds it by `prime_jax/lm_eval.py` or, in versions that discover plugins, by the entry point
group `lm_eval.models` (pyproject.toml).
"""

from prime_jax.cli import runs
from prime_jax.evaluate import harness
from prime_jax.evaluate.trained import Trained


class PrimeJax(harness.PrimeJax):
    """A finished run as a model of the harness."""

    def load(self, run: str) -> Trained:
        return runs.load(run)
