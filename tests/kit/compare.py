"""Files of recorded arrays, and how far a result is from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def relative_error(got: ArrayLike, want: ArrayLike) -> float:
    """L2 norm of ``got - want`` over the L2 norm of ``want``, in float64; 0 where both are zero.

    Raises:
        ValueError: the shapes differ (nothing is broadcast).
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape}, the recording has {want.shape}")
    difference, size = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
    if difference == 0:
        return 0.0
    return difference / size if size else float("inf")


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes an ``.npz`` file with an array under each name."""
    np.savez(path, **arrays)
