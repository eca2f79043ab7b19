"""Several processes as one run: they start together, share errors, and end together."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.multihost_utils import process_allgather

from rflow_jax.errors import InputError
from rflow_jax.parallel.layout import DistributedConfig

_GRACE = 2.0  # seconds for the others to print their errors; the exit of the first process kills them


def start_processes(config: DistributedConfig) -> None:
    """Joins the other processes; must come before anything asks JAX for its devices.

    Raises:
        InputError: they cannot be found.
    """
    if not config.enabled:
        return
    try:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"distributed: cannot join the other processes ({error}); give distributed.coordinator, num_processes and "
            "process_id"
        ) from error


def allgather_strings(text: str) -> list[str]:
    """The texts of all processes, in their order; all must call it, and all get the same list."""
    if jax.process_count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.asarray([content.size]))).reshape(-1)
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: content.size] = content
    rows = np.asarray(process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


@contextmanager
def raise_on_all() -> Iterator[None]:
    """Raises an InputError of one process in all of them, so that none waits for one that has exited.

    All processes must enter; nothing inside may wait for the others.
    """
    found: InputError | None = None
    try:
        yield
    except InputError as error:
        found = error
    # An error without a message must not count as none.
    messages = allgather_strings("" if found is None else str(found) or "the input cannot be used")
    if found is not None:
        raise found
    if first := next(filter(None, messages), None):
        raise InputError(first)


def exit_process(status: int) -> NoReturn:
    """Ends this process, at once after an error: JAX would wait for processes that may never exit."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(_GRACE)
        os._exit(status)
    raise SystemExit(status)


class Preemption:
    """A context that records SIGTERM, to be acted on between two steps.

    With several processes JAX's own handler agrees with the others on the step.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._record)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to save and stop now; the same answer in every process."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step))
