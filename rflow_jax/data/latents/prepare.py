"""Records read and decoded to be encoded; in worker processes, so nothing here imports JAX."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from rflow_jax.data.config import DataConfig
from rflow_jax.data.examples import pictures
from rflow_jax.data.latents.source import Entry
from rflow_jax.data.records import Record, RecordError, RecordSource
from rflow_jax.data.workers import Workers
from rflow_jax.errors import InputError, RunError


class Job(NamedTuple):
    """A record to be encoded."""

    subset: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Prepared(NamedTuple):
    """A record's texts and, if it can be used, its pictures: uint8 [y, y, 3] and [v, v, 3]."""

    entry: Entry
    good: np.ndarray | None = None
    bad: np.ndarray | None = None


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
            return Prepared(Entry("", "", "", str(error)))
        if self.config.crop != "center":
            _require_square(record)
        return Prepared(Entry(record.key, record.prompt, record.reflection), good, bad)


def ahead(workers: Workers, jobs: Iterable[Job], count: int) -> Iterator[Prepared]:
    """What the workers make of the jobs, in order; so many are under way.

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
            "a worker process died, for want of memory perhaps; lower data.workers, and give the same command again"
        ) from error


def _require_square(record: Record) -> None:
    with Image.open(io.BytesIO(record.good_image)) as image:
        width, height = image.size
    if width != height:
        raise InputError(
            f"{record.key}: {width} x {height} pixels are cut at a place drawn anew each time, which nothing that is "
            "computed once can follow; set data.crop to center, here and in training"
        )
