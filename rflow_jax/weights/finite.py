"""Whether the numbers of a tensor are finite, told from their bits: two passes over whole numbers, and no copy.

The bits of infinity and of everything that is not a number are those above the largest finite number, as whole numbers
without a sign for the negative ones, and with a sign for the others.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from rflow_jax.errors import InputError

BLOCK = 2**20  # bytes to check together, which the second pass still finds in the processor's cache
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
    bits, step = Bits(numbers), BLOCK // numbers.dtype.itemsize
    return all(bits.finite(start, start + step) for start in range(0, numbers.size, step))


class Bits:
    """The bits of numbers, to check them part by part. The array must be contiguous."""

    def __init__(self, numbers: np.ndarray):
        flat, size = numbers.reshape(-1), numbers.dtype.itemsize
        self._views: tuple[tuple[np.ndarray, int], ...] = ()
        if (first := _FIRST.get(numbers.dtype)) is not None:
            signed, unsigned = flat.view(f"i{size}"), flat.view(f"u{size}")
            self._views = ((signed, first), (unsigned, first + (1 << 8 * size - 1)))

    def finite(self, start: int, end: int) -> bool:
        """Whether no number with an index from ``start`` and below ``end``, if there is one, is NaN or infinite."""
        return all(int(np.maximum.reduce(view[start:end], initial=0)) < first for view, first in self._views)


def require_finite(numbers: np.ndarray, file: Path, key: str) -> None:
    """Raises InputError, naming file and tensor, if a number is NaN or infinite."""
    if not all_finite(numbers):
        raise not_finite(file, key)


def not_finite(file: Path, key: str) -> InputError:
    """The error of a tensor with such a number."""
    return InputError(f"{file}: {key} has numbers that are NaN or infinite; copy the file again, or take another one")
