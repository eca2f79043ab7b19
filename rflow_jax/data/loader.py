"""Samplers and loaders: batches whose records depend on the seed and the sample's number alone."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import Counted, RecordError, RecordSource
from rflow_jax.data.sampling import REPLACEMENT, SHUFFLE, MixtureSampler, SampleRef, random_words
from rflow_jax.data.transforms import Example, make_example
from rflow_jax.data.workers import Workers, worker_count
from rflow_jax.errors import InputError, RunError

SHARES_PER_WORKER = 4  # of a batch, so that one slow record does not hold up the others


class ItemRef(NamedTuple):
    """One drawn sample.

    Attributes:
        number: of the sample in the whole training: step * batch_size + slot.
        index: of its record.
        epoch: how often the records have been gone through before.
    """

    number: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    epoch: int


class ShuffledSampler:
    """A :class:`Sampler` that goes through all records, then again in another order.

    Args:
        count: number of records.
        batch_size, slots, position: as for :func:`~rflow_jax.data.sources.open.open_loader`.
        fingerprint: of the records and their order.
        name: what messages and statistics call the samples.

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
        self._order = lru_cache(maxsize=4)(
            lambda epoch: np.argsort(random_words(seed, SHUFFLE, (0, epoch), count), kind="stable")
        )

    def jobs(self, step: int) -> list[ItemRef]:
        numbers = [step * self._batch_size + slot for slot in self._slots]
        epochs = [divmod(number, self._count) for number in numbers]
        return [ItemRef(n, int(self._order(epoch)[k]), epoch) for n, (epoch, k) in zip(numbers, epochs, strict=True)]

    def replacement(self, job: ItemRef, attempt: int) -> ItemRef:
        """Another record; the first n - 1 attempts give every other of the n records once.

        Raises:
            InputError: there is no other.
        """
        if self._count < 2:
            raise InputError(f"data: the only one of the {self._name} cannot be used")
        word = int(random_words(self._seed, REPLACEMENT, (job.number, 0), 1)[0])
        order = self._order(job.epoch)
        slot = int(np.flatnonzero(order == job.index)[0]) + 1 + (word + attempt) % (self._count - 1)
        return job._replace(index=int(order[slot % self._count]))

    def drawn(self, step: int) -> dict[str, int]:
        return {self._name: step * self._batch_size}

    def position(self, step: int) -> dict[str, Any]:
        return {"number": step * self._batch_size, "fingerprint": self._fingerprint}


class HostBatch(NamedTuple):
    """This process's samples of one optimizer step.

    Attributes:
        numbers: uint32 [b], of the samples in the whole training.
        good, bad: uint8 [b, y, y, 3] and [b, v, v, 3].
        prompts, t5_texts: the inputs of CLIP and T5.
        skipped: key and reason of each record that could not be used and was replaced.
        waited: seconds the consumer waited.
        digest: hash of all that was drawn and decoded.
    """

    step: int
    numbers: np.ndarray
    good: np.ndarray
    bad: np.ndarray
    prompts: list[str]
    t5_texts: list[str]
    subsets: list[str]
    skipped: list[str]
    waited: float
    digest: str


class WorkerResult(NamedTuple):
    """An example (of images or latents) and its hash, or why there is none."""

    example: Any
    digest: bytes
    trouble: str = ""


@runtime_checkable
class Sampler(Protocol):
    """The samples that this process makes at each step.

    A job can be pickled, and has the ``number`` of its sample.
    """

    def jobs(self, step: int) -> Sequence[Any]: ...

    def replacement(self, job: Any, attempt: int) -> Any:
        """Another one for a job whose record cannot be used."""
        ...

    def drawn(self, step: int) -> dict[str, int]:
        """Samples of each subset before a step, of all processes."""
        ...

    def position(self, step: int) -> dict[str, Any]:
        """The state of the data before a step, as JSON."""
        ...


@runtime_checkable
class LoaderConfig(Protocol):
    """Settings of loading in advance; see :class:`~rflow_jax.data.config.DataConfig`."""

    @property
    def workers(self) -> int | None: ...

    @property
    def prefetch(self) -> int: ...

    @property
    def skip_limit(self) -> int: ...


class Loader:
    """Endless batches of a plan from step ``start`` on; a context manager that ends its workers.

    Args:
        make: picklable function from a job to its result.

    Raises:
        InputError: a shard is gone, or too many records cannot be used.
        RunError: a worker process died.
    """

    def __init__(self, plan: Sampler, make: Callable[[Any], WorkerResult], config: LoaderConfig, start: int):
        self._plan, self._config, self._start = plan, config, start
        self._skipped = 0
        self._processes = worker_count(config.workers)
        self._workers = Workers(partial(_make_each, make), self._processes)

    def drawn(self, step: int) -> dict[str, int]:
        return self._plan.drawn(step)

    def position(self, step: int) -> dict[str, Any]:
        return self._plan.position(step)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and drops their unfinished jobs."""
        self._workers.close()

    def __iter__(self) -> Iterator[HostBatch]:
        ahead: deque[tuple[int, list[tuple[Sequence[Any], Future[list[WorkerResult]]]]]] = deque()
        step = self._start
        while True:
            while len(ahead) <= self._config.prefetch:
                ahead.append((step, [(jobs, self._workers.submit(jobs)) for jobs in self._shares(step)]))
                step += 1
            begin = time.perf_counter()
            current, shares = ahead.popleft()
            skipped: list[str] = []
            results = [result for jobs, future in shares for result in self._results(jobs, future, skipped)]
            numbers = np.asarray([job.number for jobs, _ in shares for job in jobs], np.uint32)
            waited = time.perf_counter() - begin
            digest = hashlib.sha256(b"".join(result.digest for result in results)).hexdigest()[:16]
            common_fields = {"step": current, "skipped": skipped, "waited": waited, "digest": digest}
            yield self._batch(numbers, [result.example for result in results], common_fields)

    def _batch(self, numbers: np.ndarray, examples: list[Any], common_fields: dict[str, Any], /) -> Any:
        """Collates examples; ``common_fields`` are the attributes that batches of every kind have."""
        good, bad = (np.stack([getattr(example, name) for example in examples]) for name in ("good", "bad"))
        return HostBatch(numbers=numbers, good=good, bad=bad, **texts_of(examples), **common_fields)

    def _shares(self, step: int) -> list[Sequence[Any]]:
        """The jobs of a step in pieces for the workers: many small jobs would cost more to send than to do."""
        jobs = self._plan.jobs(step)
        size = max(1, len(jobs) // (SHARES_PER_WORKER * self._processes)) if self._processes else 1
        return [jobs[k : k + size] for k in range(0, len(jobs), size)]

    def _results(
        self, jobs: Sequence[Any], future: Future[list[WorkerResult]], skipped: list[str]
    ) -> Iterator[WorkerResult]:
        for job, result in zip(jobs, self._wait(future), strict=True):
            for attempt in range(self._config.skip_limit + 1):
                if result.example is not None:
                    break
                skipped.append(result.trouble)
                self._skip([result.trouble])
                (result,) = self._wait(self._workers.submit([self._plan.replacement(job, attempt)]))
            yield result

    def _wait(self, future: Future[list[WorkerResult]]) -> list[WorkerResult]:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise RunError(
                "data: a worker process died, perhaps out of memory; lower data.workers or data.prefetch, and "
                "continue with --resume"
            ) from error

    def _skip(self, errors: Sequence[str]) -> None:
        """Counts unusable records; raises InputError beyond the limit."""
        self._skipped += len(errors)
        if errors and self._skipped > self._config.skip_limit:
            raise InputError(
                f"data: {self._skipped} records cannot be used, more than data.skip_limit ({self._config.skip_limit}) "
                f"allows; the last is {errors[-1]}"
            )


@dataclass(frozen=True)
class RecordCollator:
    """Reads a drawn record and makes its example."""

    source: RecordSource
    config: DataConfig
    seed: int

    def __call__(self, draw: SampleRef) -> WorkerResult:
        try:
            example = make_example(self.source.read(draw.subset, draw.index), self.config, self.seed, draw.number)
        except RecordError as error:
            return WorkerResult(None, b"", str(error))
        return WorkerResult(example, digest_of(example))


class RecordSampler:
    """Draws of a mixture over records with random access.

    Args:
        batch_size, slots, position: as for :func:`~rflow_jax.data.sources.open.open_loader`.

    Raises:
        InputError: the records are not those of the position, or a subset that is drawn has none.
    """

    def __init__(
        self,
        records: Counted,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        slots: Sequence[int],
        position: Mapping[str, Any] | None,
    ):
        require_same_records(position, records.fingerprint)
        self._mixture = MixtureSampler(
            records.counts, config.split_ratios, config.training_stages, seed, batch_size, position
        )
        self._slots, self._fingerprint = list(slots), records.fingerprint

    def jobs(self, step: int) -> list[SampleRef]:
        draws = self._mixture.draws(step)
        return [draws[slot] for slot in self._slots]

    def replacement(self, job: SampleRef, attempt: int) -> SampleRef:
        return self._mixture.replacement(job, attempt)

    def drawn(self, step: int) -> dict[str, int]:
        return self._mixture.position(step)["drawn"]

    def position(self, step: int) -> dict[str, Any]:
        return self._mixture.position(step) | {"fingerprint": self._fingerprint}


def _make_each(make: Callable[[Any], WorkerResult], jobs: Sequence[Any]) -> list[WorkerResult]:
    return [make(job) for job in jobs]


def texts_of(examples: Sequence[Any]) -> dict[str, list[str]]:
    """The attributes of a batch that hold its examples' texts."""
    names = {"prompts": "prompt", "t5_texts": "t5_text", "subsets": "subset"}
    return {plural: [getattr(example, name) for example in examples] for plural, name in names.items()}


def digest_of(example: Example) -> bytes:
    """A hash of everything in an example."""
    texts = "\0".join([example.key, example.subset, example.prompt, example.t5_text])
    sums = (zlib.crc32(np.ascontiguousarray(pixels).data) for pixels in (example.good, example.bad))
    return hashlib.sha256(f"{texts}\0{list(sums)}".encode()).digest()


def require_same_records(position: Mapping[str, Any] | None, fingerprint: str) -> None:
    """Raises InputError if a run would continue with other records than it began with."""
    if position is not None and position.get("fingerprint") != fingerprint:
        raise InputError(
            "data: these are not the records the run began with (other shards, or another order); give the "
            "same, or start afresh with another out"
        )
