"""GenRef as a stream: each shard is read once in an epoch, and nothing needs an index or byte ranges.

Records are routed to one buffer for each subset, from which samples are drawn at random. When the mixture asks for more
of a subset than the stream holds, the others' buffers run over: a newcomer then takes the place of a random one, which
is not seen in this epoch. So memory is bounded, and the scarcest subset sets the pace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rflow_jax.data.config import DataConfig
from rflow_jax.data.loader import Loader, WorkerResult, digest_of, require_same_records
from rflow_jax.data.records import SUBSETS, RecordError
from rflow_jax.data.sampling import BUFFER, REPLACEMENT, SubsetSchedule, random_words
from rflow_jax.data.sources.stream_shards import (
    BufferedSample,
    ProcessShare,
    RawSample,
    ShardAssignment,
    Stream,
    StreamPosition,
)
from rflow_jax.data.sources.tar_index import make_record
from rflow_jax.data.storage.shards import Shard, expand
from rflow_jax.data.transforms import make_example
from rflow_jax.errors import InputError

_FIRST_FILL = 16  # records of a subset that are there before its first sample is drawn; later more are


class StreamJob:
    """A sample to be made. Only the record travels to a worker, and not those that may take its place."""

    def __init__(self, number: int, raw: RawSample, spares: Sequence[BufferedSample] = ()):
        self.number, self.raw, self.spares = number, raw, spares

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamJob, (self.number, self.raw)


@dataclass(frozen=True)
class MakeFromRaw:
    """Decodes a record and makes its example."""

    config: DataConfig
    seed: int

    def __call__(self, job: StreamJob) -> WorkerResult:
        key, subset, members, _ = job.raw
        try:
            example = make_example(make_record(key, subset, members), self.config, self.seed, job.number)
        except RecordError as error:
            return WorkerResult(None, b"", str(error))
        return WorkerResult(example, digest_of(example))


class Buffers:
    """Records of each subset, waiting to be drawn.

    Attributes:
        troubles: what could not be used of what was read; whoever tells them empties the list.

    Args:
        wanted: subsets that are drawn from; others are not kept.
        size: records of each subset.
    """

    def __init__(self, stream: Stream, route: ShardAssignment, wanted: Sequence[str], size: int, seed: int):
        self._stream, self._route, self._size, self._seed = stream, route, size, seed
        self._items: dict[str, list[BufferedSample]] = {name: [] for name in wanted}
        self._drawn = dict.fromkeys(wanted, 0)
        self._seen = dict.fromkeys(wanted, 0)  # in this epoch
        self._in_epoch: dict[str, int] | None = None  # in the one before
        self._without = dict.fromkeys(wanted, 0)  # shards since the last one of it
        self.troubles: list[str] = []

    def draw(self, subset: str, number: int) -> StreamJob:
        """A random record of a subset, which leaves the buffer.

        Raises:
            InputError: no shard holds one.
        """
        items = self._items[subset]
        while len(items) < self._fill(subset):
            self._read_on(subset)
        word = int(random_words(self._seed, BUFFER, (number, 0), 1)[0])
        chosen = items.pop(word % len(items))
        self._drawn[subset] += 1
        return StreamJob(number, chosen.raw, tuple(items))

    def snapshot(self) -> dict[str, Any]:
        """All that the next draws depend on, as JSON."""
        return {
            "place": list(self._stream.place),
            "items": {name: [list(item.place) for item in items] for name, items in self._items.items()},
            "drawn": dict(self._drawn),
            "seen": dict(self._seen),
            "in_epoch": self._in_epoch and dict(self._in_epoch),
            "without": dict(self._without),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Reads again what was in the buffers; the stream stands at the snapshot's place already.

        Raises:
            InputError: a record is not there any more, or the snapshot is none.
        """
        try:
            kept = {name: [StreamPosition(*place) for place in snapshot["items"][name]] for name in self._items}
            self._drawn, self._seen = dict(snapshot["drawn"]), dict(snapshot["seen"])
            self._in_epoch, self._without = snapshot["in_epoch"], dict(snapshot["without"])
        except (KeyError, TypeError) as error:
            raise InputError(f"the checkpoint's data position is not one of these subsets' stream ({error})") from error
        found = self._stream.items([place for places in kept.values() for place in places])
        self._items = {name: [found[place] for place in places] for name, places in kept.items()}

    def _fill(self, subset: str) -> int:
        """Records that must be there to draw one: more and more, so that the first sample does not wait for all."""
        most = self._size if self._in_epoch is None else min(self._size, self._in_epoch[subset])
        return max(1, min(most, _FIRST_FILL + self._drawn[subset]))

    def _read_on(self, subset: str) -> None:
        """Takes in one more sample."""
        found = self._stream.read()
        if found is None:
            self._end_shard(subset)
        elif found[1].trouble:
            if found[0].epoch == 0 or not found[1].key:  # a bad sample is told once, a bad shard in each epoch
                self.troubles.append(f"{found[1].key} {found[1].trouble}".strip())
        elif found[1].subset in self._items:
            self._add(BufferedSample(*found))

    def _add(self, item: BufferedSample) -> None:
        subset = item.raw.subset
        items = self._items[subset]
        self._seen[subset] += 1
        self._without[subset] = 0
        if len(items) < self._size:
            items.append(item)
            return
        epoch, shard, sample = item.place
        word = int(random_words(self._seed, REPLACEMENT, (epoch << 32 | shard, 1 + sample), 1)[0])
        items[word % len(items)] = item

    def _end_shard(self, subset: str) -> None:
        if self._stream.place[1:] == (0, 0):
            self._in_epoch, self._seen = self._seen, dict.fromkeys(self._seen, 0)
        for name in self._without:
            self._without[name] += 1
        if not self._items[subset] and self._without[subset] >= self._route.patience:
            last = f" ({self.troubles[-1]})" if self.troubles else ""
            raise InputError(f"split_ratios.{subset}: positive, but there are no records of it{last}; set it to 0")


class StreamPlan:
    """Samples of one process, drawn from its buffers step by step; steps are asked for in order."""

    def __init__(
        self, choice: SubsetSchedule, buffers: Buffers, share: ProcessShare, fingerprint: str, start: int, kept: int
    ):
        self._choice, self._buffers, self._share, self._fingerprint = choice, buffers, share, fingerprint
        self._kept = kept
        self._snapshots: dict[int, dict[str, Any]] = {start: buffers.snapshot()}
        self._troubles: dict[int, list[str]] = {}
        self._counted = 0, np.zeros(len(SUBSETS), np.int64)

    def jobs(self, step: int) -> list[StreamJob]:
        self._snapshots[step] = self._buffers.snapshot()
        self._snapshots.pop(step - self._kept, None)
        first = step * self._choice.batch_size
        subsets = self._choice.subsets(first, first + self._choice.batch_size)
        jobs = [self._buffers.draw(SUBSETS[subsets[slot]], first + slot) for slot in self._share.slots]
        self._troubles[step], self._buffers.troubles = self._buffers.troubles, []
        return jobs

    def replacement(self, job: StreamJob, attempt: int) -> StreamJob:
        """One that was in the buffer beside it, and stays there: what is drawn later does not depend on it.

        Raises:
            InputError: there was no other.
        """
        if not job.spares:
            raise InputError(f"{job.raw.key} cannot be used, and no other of {job.raw.subset} is in the buffer")
        word = int(random_words(self._choice.seed, REPLACEMENT, (job.number, 0), 1)[0])
        return StreamJob(job.number, job.spares[(word + attempt) % len(job.spares)].raw, job.spares)

    def troubles(self, step: int) -> list[str]:
        """What could not be used of what was read for a step; told once."""
        return self._troubles.pop(step, [])

    def drawn(self, step: int) -> dict[str, int]:
        number = step * self._choice.batch_size
        before, counts = self._counted if self._counted[0] <= number else (0, np.zeros(len(SUBSETS), np.int64))
        counts = counts + np.bincount(self._choice.subsets(before, number), minlength=len(SUBSETS))
        self._counted = number, counts
        return dict(zip(SUBSETS, counts.tolist(), strict=True))

    def position(self, step: int) -> dict[str, Any]:
        """Of this process; :func:`merge_positions` makes one of all processes'.

        Raises:
            KeyError: the step was not asked for yet, or long ago.
        """
        common = {"number": step * self._choice.batch_size, "drawn": self.drawn(step), "fingerprint": self._fingerprint}
        return common | {"streams": {self._share.name: self._snapshots[step]}}


class StreamLoader(Loader):
    """Batches of a stream; what is damaged in it counts as skipped."""

    def _batch(self, numbers: np.ndarray, examples: list[Any], told: dict[str, Any]) -> Any:
        assert isinstance(self._plan, StreamPlan)
        troubles = self._plan.troubles(told["step"])
        self._skip(troubles)
        return super()._batch(numbers, examples, told | {"skipped": troubles + told["skipped"]})


def merge_positions(positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One position of those of all processes, to be kept by one of them; others than streams' are all the same."""
    merged = dict(positions[0])
    if "streams" in merged:
        merged["streams"] = {name: one for position in positions for name, one in position["streams"].items()}
    return merged


def open_stream(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    slots: Sequence[int],
    start: int = 0,
    position: Mapping[str, Any] | None = None,
) -> StreamLoader:
    """The batches from step ``start`` on; see :func:`~rflow_jax.data.sources.open.open_loader`.

    A run that goes on needs its position, and reads again the shards of which its buffers held records.

    Raises:
        InputError: no shard can be read, or the position is not of this stream or of other processes.
    """
    choice = SubsetSchedule(config.split_ratios, config.training_stages, seed, batch_size)
    shards = expand(config.shards, allow_shell=config.allow_shell, patience=config.patience)
    fingerprint = _fingerprint(shards)
    require_same_records(position, fingerprint)
    share = ProcessShare.of(slots, batch_size)
    snapshot = _own_snapshot(position, share, start)
    route = ShardAssignment(shards, share, seed)
    place = StreamPosition(*snapshot["place"]) if snapshot else StreamPosition(0, 0, 0)
    buffers = Buffers(Stream(route, config.patience, place), route, choice.wanted, config.buffer, seed)
    if snapshot:
        buffers.restore(snapshot)
    plan = StreamPlan(choice, buffers, share, fingerprint, start, kept=config.prefetch + 16)
    return StreamLoader(plan, MakeFromRaw(config, seed), config, start)


def _fingerprint(shards: Sequence[Shard]) -> str:
    identity = [[shard.name, shard.size] for shard in shards]
    return hashlib.sha256(json.dumps(["stream", identity]).encode()).hexdigest()[:32]


def _own_snapshot(position: Mapping[str, Any] | None, share: ProcessShare, start: int) -> dict[str, Any] | None:
    if position is None:
        if start:
            raise InputError(f"data.format is stream: step {start} cannot be begun at without the position of a run")
        return None
    streams = position.get("streams", {})
    if share.name not in streams:
        raise InputError(
            f"data.format is stream: the run was of {len(streams)} processes with other samples; take as many again"
        )
    return streams[share.name]
