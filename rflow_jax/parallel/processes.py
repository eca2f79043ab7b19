"""Several processes as one run: they start together, hear of each other's errors, and end together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

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


def gather_texts(text: str) -> list[str]:
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
def agreed() -> Iterator[None]:
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
    told = gather_texts("" if found is None else str(found) or "the input cannot be used")
    if found is not None:
        raise found
    if first := next(filter(None, told), None):
        raise InputError(first)


def end(status: int) -> NoReturn:
    """Ends this process; after an error at once, for the others may never come to where JAX waits for them."""
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(_GRACE)
        os._exit(status)
    raise SystemExit(status)
