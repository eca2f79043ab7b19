"""Reads and decodes the records to encode, in worker processes: nothing here may import JAX."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import RecordError, RecordSource
from rflow_jax.data.sources.latents import LatentEntry
from rflow_jax.data.transforms import pictures
from rflow_jax.data.workers import Workers
from rflow_jax.errors import InputError, RunError
from rflow_jax.utils.images import size_in


class Job(NamedTuple):
    """A record to be encoded."""

    subset: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Prepared(NamedTuple):
    """A record's texts and, if it can be used, its images: uint8 [y, y, 3] and [v, v, 3]."""

    entry: LatentEntry
    good: np.ndarray = np.empty(0)
    bad: np.ndarray = np.empty(0)


@dataclass(frozen=True)
class Prepare:
    """Reads and decodes a record; can be pickled."""

    source: RecordSource
    config: DataConfig

    def __call__(self, job: Job) -> Prepared:
        try:
            record = self.source.read(*job)
            good, bad = pictures(record, self.config)
        except RecordError as error:
            return Prepared(LatentEntry("", "", "", str(error)))
        if self.config.crop != "center":
            width, height = size_in(record.good_image)
            if width != height:
                raise InputError(
                    f"{record.key}: {width} x {height} pixels are cropped at random each time, which precomputed "
                    "latents cannot follow; set data.crop to center, here and in training"
                )
        return Prepared(LatentEntry(record.key, record.prompt, record.reflection), good, bad)


def ahead(workers: Workers, jobs: Iterable[Job], count: int) -> Iterator[Prepared]:
    """The results of the jobs in order, with ``count`` of them in flight.

    Raises:
        RunError: a worker process died.
    """
    waiting: deque[Future[Prepared]] = deque()
    try:
        for job in jobs:
            waiting.append(workers.submit(job))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process died, perhaps out of memory; lower data.workers, and give the same command again"
        ) from error
