"""What worker processes are given to do in tests; importable in them."""

from __future__ import annotations

import os

import numpy as np


def make_arrays(size: int) -> tuple[str, list[np.ndarray]]:
    """A text and two arrays that follow from ``size``."""
    floats = (np.arange(size // 8 * 4, dtype=np.float32) * 0.5).reshape(-1, 4)
    return f"of {size}", [np.arange(size, dtype=np.uint8), floats]


def fail(name: str) -> None:
    raise ValueError(f"no {name}")


def die(_: str) -> None:
    os._exit(1)
