"""Whether the numbers of a tensor are finite, told from their bits: two passes over whole numbers, and no copy.

The bits of infinity and of everything that is not a number are those above the largest finite number, as whole numbers
without a sign for the negative ones, and with a sign for the others.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from rflow_jax.errors import InputError

_BLOCK = 2**20  # bytes that the second pass still finds in the processor's cache
# Floating-point type -> the bits of its smallest positive number that is not finite.
_FIRST = {
    np.dtype(np.float64): 0x7FF0000000000000,
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,  # has no infinity
}


def all_finite(numbers: np.ndarray) -> bool:
    """Whether no number is NaN or infinite; whole numbers and booleans never are. The array must be contiguous."""
    if numbers.dtype not in _FIRST:
        return True
    size, first = numbers.dtype.itemsize, _FIRST[numbers.dtype]
    flat, step = numbers.reshape(-1), _BLOCK // size
    for start in range(0, flat.size, step):
        block = flat[start : start + step]
        if np.maximum.reduce(block.view(f"i{size}")) >= first:
            return False
        if np.maximum.reduce(block.view(f"u{size}")) >= first + (1 << 8 * size - 1):
            return False
    return True


def require_finite(numbers: np.ndarray, file: Path, key: str) -> None:
    """Raises InputError, naming file and tensor, if a number is NaN or infinite."""
    if not all_finite(numbers):
        raise not_finite(file, key)


def not_finite(file: Path, key: str) -> InputError:
    """The error of a tensor with such a number."""
    return InputError(f"{file}: {key} has numbers that are NaN or infinite; copy the file again, or take another one")
