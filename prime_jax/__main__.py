"""`python -m prime_jax`, the same as `prime-jax`."""

import sys

from prime_jax.cli import main

sys.exit(main())
