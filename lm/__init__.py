"""`lm`: language models from raw text to samples, in JAX and Flax."""

__version__ = "0.1.0"
