"""Foreign model formats to model folders and back: ``python -m converters --help``.

A model's conversion is a table of rows (``engine.Row``) that one strict engine reads in both directions. This package may
import torch and transformers; ``ichigo_jax`` never imports this package.
"""
