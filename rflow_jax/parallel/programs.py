"""Compiled programs that several threads of a process start on the same GPUs.

The first run of a program with a kernel of cuDNN loads the kernel by recording a CUDA graph, on the stream that all
programs share. What another thread starts meanwhile is recorded instead of being run: the process fails ("capturing
stream has unjoined work"), crashes or hangs, or an image is NaN. So threads take turns to start programs, and a first
run has the GPUs to itself. On other devices these are plain programs.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

import jax

_turn = threading.RLock()
_started: deque[jax.Array] = deque(maxlen=64)  # one output of each program that may still run; they run in order


def turn() -> threading.RLock:
    """The turn of a thread, a context manager: inside, no other thread starts a :class:`SharedProgram`.

    For operations outside of programs, such as slices, beside models in other threads.
    """
    return _turn


class SharedProgram:
    """As ``jax.jit(function, **options)``, for functions that threads call beside each other."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        functools.update_wrapper(self, function)
        self._jitted = jax.jit(function, **options)
        self.lower, self.trace = self._jitted.lower, self._jitted.trace
        self._known: set[Hashable] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if jax.default_backend() != "gpu":
            return self._jitted(*args, **kwargs)
        with _turn:
            if (key := _signature(args, kwargs)) in self._known:
                output = self._jitted(*args, **kwargs)
                _note(output)
            else:
                _wait()
                output = jax.block_until_ready(self._jitted(*args, **kwargs))
                self._known.add(key)
        return output


def shared_jit(**options: Any) -> Callable[[Callable[..., Any]], SharedProgram]:
    """A decorator that makes a :class:`SharedProgram`, with the options of ``jax.jit``."""
    return lambda function: SharedProgram(function, **options)


def _signature(args: Any, kwargs: Any) -> Hashable:
    """What decides whether a call compiles anew: shapes and dtypes of arrays, all else as it is."""
    leaves = jax.tree.leaves((args, sorted(kwargs.items())))
    return tuple((leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf for leaf in leaves)


def _note(output: Any) -> None:
    """Remembers that a program was started; its smallest output stands for it, so that no memory is kept."""
    arrays = [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]
    _started.extend(sorted(arrays, key=lambda array: array.size)[:1])


def _wait() -> None:
    """Waits for all programs that were started."""
    while _started:
        with suppress(Exception):  # it was donated, or its own thread learns of its error
            _started.popleft().block_until_ready()
