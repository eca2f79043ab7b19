"""A checkpoint on its way into our layout, one parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.tables import Plan

AHEAD_BYTES = 2**28  # of the checkpoint's tensors read before they are needed

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Leaf:
    """One parameter to be written: our path, and what it will be in the file."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Conversion:
    """A checkpoint seen through a plan: what it will become, and that, one parameter at a time.

    Args:
        dtype: of the parameters; None keeps each tensor's.
    """

    def __init__(self, the_plan: Plan, files: TensorFiles, dtype: Any = None):
        self.plan = the_plan
        self.files = files
        self.dtype = None if dtype is None else np.dtype(dtype)
        self.keys = [key for key in files if key in the_plan.entries]

    def leaves(self) -> list[Leaf]:
        """Every parameter, in the order of the checkpoint's files."""
        return [
            Leaf(target.path, self.dtype or self.files[key].dtype, target.shape)
            for key in self.keys
            for target in self.plan.entries[key]
        ]

    def stream(self, on_bytes: OnBytes | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """(our path, parameter) in the order of :meth:`leaves`; the host holds a few tensors at a time."""
        for key, tensor in self.files.stream(self.keys, ahead=AHEAD_BYTES):
            yield from self._ours(key, tensor)
            if on_bytes:
                on_bytes(tensor.nbytes)

    def read(self, key: str) -> dict[str, np.ndarray]:
        """The parameters that one of the checkpoint's tensors holds."""
        return dict(self._ours(key, self.files.read(key)))

    def _ours(self, key: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for target, rows in self.plan.split(key, tensor):
            value = target.to_ours(rows)
            yield target.path, np.ascontiguousarray(value if self.dtype is None else value.astype(self.dtype))
