"""Calls of verifiers and language models, beside the generator: a pool of threads for each of them."""

import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

INTERRUPTED = 130  # the exit status
OnResult = Callable[[Any, Any], None]
AT_ONCE = 0.5  # seconds in which threads without a call end
PATIENCE = 60.0  # seconds in which a call under way ends, on a model that has been closed


class BatchingPool:
    """Asks one model about works; so many calls at once, with so many works each, as the model takes.

    Args:
        name: of the threads.
        call: works -> results in their order.
        on_result: told each work and its result, by the thread that asked.
        on_error: told of an exception; the thread goes on.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[Sequence[Any]], Sequence[Any]],
        concurrency: int,
        batch_size: int,
        on_result: OnResult,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._call = call
        self._batch_size = batch_size
        self._on_result = on_result
        self._on_error = on_error
        self._works: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._asked = 0
        self._closed = False
        # Daemons: a call that never returns keeps no process alive.
        self._threads = [
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True) for number in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def asked(self) -> int:
        """Works whose answer is being waited for, or that wait for their turn."""
        with self._lock:
            return self._asked

    @property
    def waiting(self) -> bool:
        """Whether works wait for their turn."""
        return not self._works.empty()

    def submit(self, work: Any) -> None:
        """Asks about a work when there is room."""
        with self._lock:
            self._asked += 1
        self._works.put(work)

    def cancel_pending(self) -> None:
        """Forgets the works whose turn has not come."""
        while not (self._works.empty() or self._closed):
            try:
                self._works.get_nowait()
            except queue.Empty:
                return
            with self._lock:
                self._asked -= 1

    def close(self) -> None:
        """Takes no more works up; what calls under way still answer is dropped, for they may have been given up."""
        self._closed = True
        self._works.put(None)

    def join(self, patience: float = PATIENCE) -> bool:
        """Whether the threads have ended, in so many seconds; after ``close``, and after the model was told to give up.

        A thread that is still in native code when the interpreter ends takes the process down with it, be it only to
        free the arrays of a model of which it holds the last reference.
        """
        end = time.monotonic() + patience
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def _serve(self) -> None:
        while (works := self._take()) is not None:
            try:
                for work, result in zip(works, self._call(works), strict=True):
                    if not self._closed:
                        self._on_result(work, result)
            except BaseException as error:
                if not self._closed:
                    self._on_error(error)
            finally:
                with self._lock:
                    self._asked -= len(works)

    def _take(self) -> list[Any] | None:
        """At least one work, and more if they wait already."""
        works = [self._works.get()]
        while len(works) < self._batch_size and not self._works.empty():
            try:
                works.append(self._works.get_nowait())
            except queue.Empty:  # another thread was quicker
                break
        if self._closed:
            self._works.put(None)  # for the next thread
            return None
        return works


def wait_for(*all_calls: BatchingPool) -> None:
    """Joins them; says so where it takes a while, and an interrupt then ends the process without further waiting."""
    try:
        if all(calls.join(AT_ONCE) for calls in all_calls):
            return
        print("finishing the batch under way; Ctrl-C again to stop now", file=sys.stderr, flush=True)
        for calls in all_calls:
            calls.join()
    except KeyboardInterrupt:
        # As the last step of a regular exit, and instead of what would take the process down (see BatchingPool.join).
        atexit.register(os._exit, INTERRUPTED)
        raise
