"""Records -> batches of arrays: read, decoded, tokenized and cut into patches by workers, then stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rflow_jax.data.loader import Loader, LoaderConfig, Made
from rflow_jax.data.records import RecordError, first_held_out
from rflow_jax.data.shuffle import Job, ShuffledPlan
from rflow_jax.errors import InputError


@runtime_checkable
class Source(Protocol):
    """Random access to records. It can be pickled, to be read in worker processes.

    Attributes:
        fingerprint: of the records and their order.
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """Reads one record; raises RecordError where it cannot be used."""
        ...


@runtime_checkable
class Maker(Protocol):
    """Makes what the network is given. It can be pickled, too."""

    def example(self, record: Any, /) -> Any:
        """One prepared record; raises RecordError where it cannot be used."""
        ...

    def inputs(self, examples: Sequence[Any], count: int) -> Any:
        """Examples as arrays that begin with ``count`` rows; those beyond the examples have no influence."""
        ...

    def digest(self, record: Any, /) -> bytes:
        """A hash of everything in a record."""
        ...


class ArrayBatch(NamedTuple):
    """This process's samples of one step; attributes as in :class:`~rflow_jax.data.loader.HostBatch`."""

    step: int
    inputs: Any
    skipped: list[str]
    waited: float
    digest: str


@dataclass(frozen=True)
class MakeExample:
    """Reads the record that a job names, and prepares it; runs in a worker."""

    source: Source
    maker: Maker

    def __call__(self, job: Job) -> Made:
        try:
            record = self.source.read(job.index)
            return Made(self.maker.example(record), self.maker.digest(record))
        except RecordError as error:
            return Made(None, b"", str(error))


class ArrayLoader(Loader):
    """Batches of arrays."""

    def __init__(self, plan: ShuffledPlan, source: Source, maker: Maker, config: LoaderConfig, start: int):
        super().__init__(plan, MakeExample(source, maker), config, start)
        self._maker = maker

    def _batch(self, numbers: np.ndarray, examples: list[Any], told: dict[str, Any]) -> Any:
        return ArrayBatch(inputs=self._maker.inputs(examples, len(examples)), **told)


def open_array_loader(
    source: Source,
    maker: Maker,
    config: LoaderConfig,
    *,
    start: int,
    position: Mapping[str, Any] | None,
    **how: Any,
) -> ArrayLoader:
    """Batches from a step on; ``how`` as in :class:`~rflow_jax.data.shuffle.ShuffledPlan`."""
    plan = ShuffledPlan(len(source), fingerprint=source.fingerprint, position=position, **how)
    return ArrayLoader(plan, source, maker, config, start)


def first_usable(source: Source, maker: Maker, count: int) -> list[Any]:
    """The examples of the first usable records.

    Raises:
        InputError: there is none.
    """
    found, trouble = first_held_out(lambda index: maker.example(source.read(index)), len(source), count)
    if not found:
        raise InputError(f"validation: no record is usable; the last: {trouble}")
    return found
