"""Several processes as one run: they start together, hear of each other's errors, and end together."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.multihost_utils import process_allgather

from rflow_jax.data.sources.stream import merge_positions
from rflow_jax.errors import InputError
from rflow_jax.parallel.layout import DistributedConfig

_GRACE = 2.0  # seconds in which the others tell their errors; the first process's end takes them down


def start_processes(config: DistributedConfig) -> None:
    """Joins the other processes; before anything else asks JAX for its devices.

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
    """Every process's text, in their order; all must call it, and all get the same."""
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
    """What one process finds wrong with the input is raised in all, so that none waits for one that has gone.

    All must come here; nothing inside may wait for the others.

    Raises:
        InputError: a process has raised it inside.
    """
    found: InputError | None = None
    try:
        yield
    except InputError as error:
        found = error
    # An error without words must not pass for none.
    told = allgather_strings("" if found is None else str(found) or "the input cannot be used")
    if found is not None:
        raise found
    if first := next(filter(None, told), None):
        raise InputError(first)


def exit_process(status: int) -> NoReturn:
    """Ends this process; after an error at once, for the others may never come to where JAX waits for them."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(_GRACE)
        os._exit(status)
    raise SystemExit(status)


class Preemption:
    """A context in which SIGTERM is remembered, to be acted on between two steps.

    JAX's own handler, which comes with several processes, agrees with the others on the step.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to save and stop now; the same answer in every process."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step))


def gather_data_state(position: dict[str, Any]) -> dict[str, Any]:
    """The position of all processes' data; all must call it, and all get the same.

    Only a stream's processes each have a place of their own.
    """
    if jax.process_count() == 1 or "streams" not in position:
        return position
    return merge_positions([json.loads(text) for text in allgather_strings(json.dumps(position))])
