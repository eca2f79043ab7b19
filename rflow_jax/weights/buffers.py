"""Memory for tensors that is used again once nobody has the tensor any more.

The system clears the pages of every new array, which takes a third of the time of a read from its page cache.
"""

from __future__ import annotations

import threading

import numpy as np

_LEAST = 2**20  # bytes; of smaller arrays the allocator itself keeps the pages
_GRAIN = 2**12  # bytes: a page


class Arena:
    """The memory of one stream of tensors, given out in pieces; safe for several threads.

    Args:
        nbytes: its size. A tensor for which there is no room gets memory of its own.
    """

    def __init__(self, nbytes: int):
        self._memory = np.empty(nbytes, np.uint8)  # no pages yet
        self._free = [(0, nbytes)]  # (start, end), in order, none next to another
        self._lock = threading.RLock()  # collecting garbage may give a piece back in the middle of ``take``

    def take(self, nbytes: int) -> np.ndarray:
        """Bytes of any content; they are free again when the array and all its views are gone."""
        size = -(-nbytes // _GRAIN) * _GRAIN
        with self._lock:
            place = next((k for k, (start, end) in enumerate(self._free) if end - start >= size), None)
            if place is None or nbytes < _LEAST:
                return np.empty(nbytes, np.uint8)
            start, end = self._free.pop(place)
            if start + size < end:
                self._free.insert(place, (start + size, end))
        # NumPy's views of an array refer to what it was made from.
        return np.asarray(_Piece(self, self._memory[start : start + nbytes], start, start + size))

    def give_back(self, start: int, end: int) -> None:
        """Makes these bytes free."""
        with self._lock:
            joined: list[tuple[int, int]] = []
            for piece in sorted([*self._free, (start, end)]):
                if joined and joined[-1][1] == piece[0]:
                    piece = joined.pop()[0], piece[1]
                joined.append(piece)
            self._free = joined


class _Piece:
    """Bytes of an arena, which go back when the last array of them is gone."""

    def __init__(self, arena: Arena, memory: np.ndarray, start: int, end: int):
        self._arena, self._place = arena, (start, end)
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._arena.give_back(*self._place)


_of_thread = threading.local()


def use_arena(arena: Arena) -> None:
    """Lets :func:`new_buffer` take memory for this thread from an arena."""
    _of_thread.arena = arena


def new_buffer(nbytes: int) -> np.ndarray:
    """Bytes of any content."""
    arena: Arena | None = getattr(_of_thread, "arena", None)
    return np.empty(nbytes, np.uint8) if arena is None else arena.take(nbytes)
