"""Memory that worker processes fill and their parent reads in place.

Slabs are files without a name: nothing is left behind when all processes are killed.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np


class Slab:
    """One piece of shared memory; it grows to what is written to it.

    Attributes:
        path: under which a child process opens it.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("rflow_jax"), "r+b", buffering=0)
        self._memory: mmap.mmap | None = None
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def read(self, length: int) -> np.ndarray:
        """Its first bytes, in place: uint8 [length]."""
        if self._memory is None or len(self._memory) < length:
            self._memory = mmap.mmap(self._file.fileno(), length)
        return np.frombuffer(self._memory, np.uint8, length)


class Slabs:
    """Slabs that are used again: fresh memory costs more than it takes to fill it."""

    def __init__(self) -> None:
        self._free: deque[Slab] = deque()  # without a lock: a slab may come back while one is taken

    def take(self) -> Slab:
        """One that nothing lies in."""
        try:
            return self._free.pop()
        except IndexError:
            return Slab()

    def lend(self, slab: Slab, lengths: Sequence[int]) -> list[np.ndarray]:
        """What lies in a slab, piece by piece; the slab is free again when all pieces, and views of them, are gone."""
        if not sum(lengths):
            self._free.append(slab)
            return [np.empty(0, np.uint8) for _ in lengths]
        whole = slab.read(sum(lengths))
        weakref.finalize(whole, self._free.append, slab).atexit = False
        return np.split(whole, np.cumsum(lengths)[:-1])


def fill(path: str, pieces: Sequence[memoryview]) -> None:
    """Writes the pieces one after the other; called in a child process."""
    file = os.open(path, os.O_WRONLY)
    try:
        written = os.pwritev(file, pieces, 0)
    finally:
        os.close(file)
    if written != sum(piece.nbytes for piece in pieces):
        raise MemoryError("no shared memory is left; lower data.workers or data.prefetch")
