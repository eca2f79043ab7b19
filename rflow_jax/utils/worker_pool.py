"""Thread pools that call verifiers and language models while the generator runs."""

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
AT_ONCE = 0.5  # seconds for idle threads to end
PATIENCE = 60.0  # seconds for a running call to end, on a model that has been closed


class BatchingPool:
    """Calls one model on tasks, in ``concurrency`` threads and up to ``batch_size`` tasks per call.

    Args:
        name: of the threads.
        call: function from tasks to results in the same order.
        on_result: called with each task and its result, by the thread of the call.
        on_error: called with an exception; the thread goes on.
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
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
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
        """The number of tasks submitted and not yet answered."""
        with self._lock:
            return self._asked

    @property
    def waiting(self) -> bool:
        """Whether tasks are waiting for a thread."""
        return not self._tasks.empty()

    def submit(self, task: Any) -> None:
        with self._lock:
            self._asked += 1
        self._tasks.put(task)

    def cancel_pending(self) -> None:
        """Drops the waiting tasks."""
        while not (self._tasks.empty() or self._closed):
            try:
                self._tasks.get_nowait()
            except queue.Empty:
                return
            with self._lock:
                self._asked -= 1

    def close(self) -> None:
        """Begins no more tasks; later results of running calls are dropped, for they may have been cancelled."""
        self._closed = True
        self._tasks.put(None)

    def join(self, patience: float = PATIENCE) -> bool:
        """Waits up to ``patience`` seconds, after ``close``, and returns whether all threads have ended.

        A thread that is still in native code when the interpreter ends crashes the process, even if it only frees the
        arrays of a model whose last reference it has.
        """
        end = time.monotonic() + patience
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def _serve(self) -> None:
        while (tasks := self._take()) is not None:
            try:
                for task, result in zip(tasks, self._call(tasks), strict=True):
                    if not self._closed:
                        self._on_result(task, result)
            except BaseException as error:
                if not self._closed:
                    self._on_error(error)
            finally:
                with self._lock:
                    self._asked -= len(tasks)

    def _take(self) -> list[Any] | None:
        """At least one task, and more if they are waiting already."""
        tasks = [self._tasks.get()]
        while len(tasks) < self._batch_size and not self._tasks.empty():
            try:
                tasks.append(self._tasks.get_nowait())
            except queue.Empty:  # another thread was quicker
                break
        if self._closed:
            self._tasks.put(None)  # for the next thread
            return None
        return tasks


def wait_for(*all_calls: BatchingPool) -> None:
    """Joins them, with a message if that takes a while; an interrupt then ends the process without waiting."""
    try:
        if all(calls.join(AT_ONCE) for calls in all_calls):
            return
        print("finishing the batch under way; Ctrl-C again to stop now", file=sys.stderr, flush=True)
        for calls in all_calls:
            calls.join()
    except KeyboardInterrupt:
        # As the last step of a regular exit, before a thread can crash the process (see BatchingPool.join).
        atexit.register(os._exit, INTERRUPTED)
        raise
