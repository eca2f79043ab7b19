"""Processes that read and decode. They never import JAX, and end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

_make: Callable[[Any], Any] | None = None


def worker_count(asked: int | None) -> int:
    """Processes to start: one a core but one, unless a number is asked for."""
    return max(1, len(os.sched_getaffinity(0)) - 1) if asked is None else asked


def start_workers(make: Callable[[Any], Any], count: int) -> ProcessPoolExecutor:
    """Processes that hold ``make`` and call it for jobs.

    Started afresh and not forked: a fork of a process in which JAX's threads run can hang.
    """
    return ProcessPoolExecutor(count, mp_context=_Context(), initializer=_begin, initargs=(make,))


def make(job: Any) -> Any:
    """What ``start_workers`` was given, called in a worker."""
    assert _make is not None
    return _make(job)


class _Process(SpawnProcess):
    """A process that does not run the parent's main file again, which would import all of JAX for nothing."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process_obj)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Process


def _begin(make: Callable[[Any], Any]) -> None:
    global _make
    _make = make
    # Ctrl-C and a scheduler's SIGTERM reach the whole group; it is for the parent to end its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
