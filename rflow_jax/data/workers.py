"""Worker processes, and the shared memory they return arrays in.

Shared buffers are anonymous files: nothing is left behind when all processes are killed.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class SharedBuffer:
    """A piece of shared memory that grows as needed; a child process opens it by its ``path``."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("rflow_jax"), "r+b", buffering=0)
        self._memory: mmap.mmap | None = None
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def read(self, length: int) -> np.ndarray:
        """Its first bytes, in place: uint8 [length]."""
        if self._memory is None or len(self._memory) < length:
            self._memory = mmap.mmap(self._file.fileno(), length)
        return np.frombuffer(self._memory, np.uint8, length)


class SharedBufferPool:
    """Reuses shared buffers: fresh memory costs more than filling it."""

    def __init__(self) -> None:
        self._free: deque[SharedBuffer] = deque()  # without a lock: a buffer may come back while one is taken

    def take(self) -> SharedBuffer:
        """An unused buffer."""
        try:
            return self._free.pop()
        except IndexError:
            return SharedBuffer()

    def views(self, buffer: SharedBuffer, lengths: Sequence[int]) -> list[np.ndarray]:
        """The pieces in a buffer, which is free again when all of them, and views of them, are gone."""
        if not sum(lengths):
            self._free.append(buffer)
            return [np.empty(0, np.uint8) for _ in lengths]
        whole = buffer.read(sum(lengths))
        weakref.finalize(whole, self._free.append, buffer).atexit = False
        return np.split(whole, np.cumsum(lengths)[:-1])


def write_pieces(path: str, pieces: Sequence[memoryview]) -> None:
    """Writes the pieces one after the other; called in a child process."""
    file = os.open(path, os.O_WRONLY)
    try:
        written = os.pwritev(file, pieces, 0)
    finally:
        os.close(file)
    if written != sum(piece.nbytes for piece in pieces):
        raise MemoryError("no shared memory is left; lower data.workers or data.prefetch")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MAPPED = 32 << 20  # bytes; glibc refuses a larger threshold
_LARGEST_KEPT = 1 << 30
_PILLOW_BLOCKS = 16  # of 16 MiB
GRACE = 3.0  # seconds for running jobs to end, unless they wait for a server: that may take minutes

_make: Callable[[Any], Any] | None = None


def worker_count(asked: int | None) -> int:
    """The number of processes to start; by default one fewer than there are cores."""
    return max(1, len(os.sched_getaffinity(0)) - 1) if asked is None else asked


class Background:
    """A daemon thread that runs one call after the other."""

    def __init__(self, name: str):
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, call, args))
        return future

    def close(self) -> None:
        """Cancels what has not begun; a running call gets a little time, then is abandoned."""
        while not self._calls.empty():
            if waiting := self._calls.get():
                waiting[0].cancel()
        self._calls.put(None)
        self._thread.join(GRACE)

    def _serve(self) -> None:
        while asked := self._calls.get():
            future, call, args = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(*args))
            except BaseException as error:
                future.set_exception(error)
            del asked, future, call, args  # so that nothing stays in memory until the next call


class Workers:
    """Processes that call one function for many jobs; a context manager that ends them.

    They are spawned, not forked: a fork of a process in which JAX's threads run can hang. Arrays in their results come
    through shared memory, not through a pipe, which would cost more than decoding an image does.

    Args:
        make: picklable function of a job.
        count: 0 calls it in a thread of this process.
    """

    def __init__(self, make: Callable[[Any], Any], count: int):
        self._in_thread = None if count else make
        self._buffers = SharedBufferPool() if count and hasattr(os, "memfd_create") else None
        self._context = _Context()
        self._pool = (
            ProcessPoolExecutor(count, mp_context=self._context, initializer=_begin, initargs=(make,))
            if count
            else Background("data")
        )

    def submit(self, job: Any) -> Future[Any]:
        """The future result of a job; BrokenProcessPool if a process died."""
        if self._in_thread:
            return self._pool.submit(self._in_thread, job)
        made: Future[Any] = Future()
        buffer = self._buffers.take() if self._buffers else None
        try:
            packed = self._pool.submit(_pack, job, buffer and buffer.path)
        except BrokenProcessPool as error:
            made.set_exception(error)
            return made
        packed.add_done_callback(lambda done: _unpack(done, buffer, self._buffers, made))
        return made

    def close(self) -> None:
        """Ends the workers and drops unfinished jobs; a process that does not end by itself is killed."""
        if isinstance(self._pool, Background):
            self._pool.close()
            return
        ended = threading.Thread(target=self._pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        ended.start()
        ended.join(GRACE)
        if ended.is_alive():
            self._context.kill()
            ended.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Packed(NamedTuple):
    """A pickle without its arrays: these are one after the other in a shared buffer."""

    pickled: bytes
    lengths: list[int]


def _pack(job: Any, path: str | None) -> Packed:
    assert _make is not None
    made = _make(job)
    if path is None:
        return Packed(pickle.dumps(made, pickle.HIGHEST_PROTOCOL), [])
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(made, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    if raw:
        write_pieces(path, raw)
    return Packed(pickled, [part.nbytes for part in raw])


def _unpack(
    done: Future[Packed], buffer: SharedBuffer | None, buffers: SharedBufferPool | None, made: Future[Any]
) -> None:
    """Passes on a worker's result; the buffer is free again once no array uses it."""
    try:
        packed = done.result()
        parts = [] if buffer is None or buffers is None else buffers.views(buffer, packed.lengths)
        made.set_result(pickle.loads(packed.pickled, buffers=parts))
    except CancelledError:
        made.cancel()
    except BaseException as error:
        made.set_exception(error)


class _Process(SpawnProcess):
    """A process that does not re-run the parent's main file, which would import JAX for nothing."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process_obj)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    """Remembers its processes, to kill those that hang."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[_Process] = []

    def Process(self, *args: Any, **more: Any) -> _Process:  # pyright: ignore[reportIncompatibleVariableOverride]
        process = _Process(*args, **more)
        self._started.append(process)
        return process

    def kill(self) -> None:
        for process in self._started:
            process.kill()


def _begin(make: Callable[[Any], Any]) -> None:
    global _make
    _make = make
    # Ctrl-C and a scheduler's SIGTERM reach the whole group, but the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Freed memory is reused: images that return theirs to the system and allocate it anew cost a third more.
    Image.core.set_blocks_max(_PILLOW_BLOCKS)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MAPPED)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
