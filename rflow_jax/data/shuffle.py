"""Records in an order of their own for each epoch: a function of the seed and the sample's number alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from rflow_jax.data.choice import REPLACEMENT, SHUFFLE, random_words
from rflow_jax.data.loader import require_same_records
from rflow_jax.errors import InputError


class Job(NamedTuple):
    """One drawn sample.

    Attributes:
        number: of the sample in the whole training: step * batch_size + slot.
        index: of its record.
        epoch: how often the records have been gone through before.
    """

    number: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    epoch: int


class ShuffledPlan:
    """A :class:`~rflow_jax.data.loader.Plan` that goes through all records, then again in another order.

    Args:
        count: of the records.
        batch_size: samples of a step, over all processes.
        slots: which of them this process makes.
        fingerprint: of the records and their order.
        name: of the samples, in what is told of them.
        position: where a run stood that goes on.

    Raises:
        InputError: these are not the records of the position.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        batch_size: int,
        slots: Sequence[int],
        fingerprint: str,
        name: str,
        position: Mapping[str, Any] | None = None,
    ):
        require_same_records(position, fingerprint)
        self._count, self._seed, self._batch_size, self._slots = count, seed, batch_size, list(slots)
        self._fingerprint, self._name = fingerprint, name
        self._order = lru_cache(maxsize=4)(self._draw_order)

    def jobs(self, step: int) -> list[Job]:
        return [self._job(step * self._batch_size + slot) for slot in self._slots]

    def replacement(self, job: Job, attempt: int) -> Job:
        """Another record; the first n - 1 attempts give every other of the n records once.

        Raises:
            InputError: there is no other.
        """
        if self._count < 2:
            raise InputError(f"data: the only one of the {self._name} cannot be used")
        word = int(random_words(self._seed, REPLACEMENT, (job.number, 0), 1)[0])
        order = self._order(job.epoch)
        place = int(np.flatnonzero(order == job.index)[0]) + 1 + (word + attempt) % (self._count - 1)
        return job._replace(index=int(order[place % self._count]))

    def drawn(self, step: int) -> dict[str, int]:
        return {self._name: step * self._batch_size}

    def position(self, step: int) -> dict[str, Any]:
        return {"number": step * self._batch_size, "fingerprint": self._fingerprint}

    def _job(self, number: int) -> Job:
        epoch, place = divmod(number, self._count)
        return Job(number, int(self._order(epoch)[place]), epoch)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.argsort(random_words(self._seed, SHUFFLE, (0, epoch), self._count), kind="stable")
