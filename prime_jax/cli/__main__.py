"""`python -m prime_jax.cli`."""

import sys

from prime_jax.cli import main

sys.exit(main())
