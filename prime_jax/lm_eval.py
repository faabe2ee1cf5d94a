"""lm-eval's own command with our model: `python -m prime_jax.lm_eval run --model prime_jax ...`.

The arguments are lm-eval's. Its versions that discover plugins find the model by the entry point
group `lm_eval.models`, and `lm-eval run` does the same there; 0.4.13 discovers none.
"""

import sys

from prime_jax.cli import boundary
from prime_jax.errors import UserError

MODEL = "prime_jax.cli.harness:PrimeJax"


def main() -> int:
    """Run lm-eval on the words of this process; returns its exit code (`boundary`)."""
    return boundary.guarded(_run)


def _run() -> None:
    try:
        import lm_eval.models  # noqa: F401  its own, which it imports only while it knows no model
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UserError(
            f"lm-eval cannot be imported ({error}); install it with: pip install 'prime_jax[eval]'"
        ) from error
    if "prime_jax" not in model_registry:  # as a name: JAX loads when the model is wanted
        model_registry.register("prime_jax", target=MODEL)
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
