"""What models compute in at inference."""

from typing import Any, Literal

import jax.numpy as jnp

from ichigo_jax.errors import InputError

Dtype = Literal["float32", "bfloat16"]
NAMES = ("float32", "bfloat16")


def checked_dtype(dtype: Dtype) -> Any:
    """The dtype of that name.

    Raises:
      InputError: a name of another dtype, float16 say, whose range is too small for these models, or of none.
    """
    if dtype not in NAMES:
        raise InputError(f"dtype {dtype!r} found, expected {' or '.join(NAMES)}")
    return jnp.dtype(dtype)
