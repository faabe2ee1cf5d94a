"""prime_jax: scaling masked diffusion language models over sub-tokens, with valid likelihoods."""

__version__ = "0.1.0"
