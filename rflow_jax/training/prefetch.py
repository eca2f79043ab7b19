"""Batches on the devices: tokenized and sent while the previous step is computed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from rflow_jax.data.loader import HostBatch
from rflow_jax.data.workers import Background
from rflow_jax.parallel.mesh import BATCH, put_batch
from rflow_jax.training.corrector.step import StepInputs
from rflow_jax.weights.flux import FluxModel

AHEAD = 2


def slots_here(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    return sorted({row for rows, *_ in filter(None, indices.values()) for row in range(*rows.indices(batch_size))})


def put_pixels(flux: FluxModel, text_length: int, mesh: Mesh) -> Callable[[HostBatch], StepInputs]:
    """A function that tokenizes a batch and puts it onto the mesh."""

    def put(batch: HostBatch) -> StepInputs:
        clip_ids = flux.tokenizers.clip(batch.prompts, flux.clip_length)
        t5_ids = flux.tokenizers.t5(batch.t5_texts, text_length)
        return StepInputs(*put_batch(mesh, (batch.good, batch.bad, clip_ids, t5_ids, batch.numbers)))

    return put


def prefetch_to_device(batches: Iterator[Any], put: Callable[[Any], Any]) -> Generator[tuple[Any, Any]]:
    """(batch, its arrays on the devices); :data:`AHEAD` of them are made in advance, in a thread.

    ``waited`` of a batch becomes the seconds for which the consumer waited. At the end, a pending batch is not waited
    for long: it may come from a server that does not answer.
    """

    def make() -> tuple[Any, Any]:
        batch = next(batches)
        return batch, jax.block_until_ready(put(batch))

    with closing(Background("feed")) as thread:
        pending = deque(thread.submit(make) for _ in range(AHEAD))
        while True:
            begin = time.perf_counter()
            batch, arrays = pending.popleft().result()
            waited = time.perf_counter() - begin
            pending.append(thread.submit(make))
            yield batch._replace(waited=waited), arrays
