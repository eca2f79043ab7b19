"""GenRef as a stream: each shard is read once in an epoch, without an index or byte ranges.

Records go to one buffer for each subset, from which samples are drawn at random. When the mixture asks for more of a
subset than the stream contains, the others' buffers overflow: a new record then replaces a random one, which is not
seen in this epoch. So memory is bounded, and the scarcest subset sets the pace.
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
    RecordStream,
    ShardAssignment,
    StreamPosition,
)
from rflow_jax.data.sources.tar_members import make_record
from rflow_jax.data.storage.shards import expand
from rflow_jax.data.transforms import make_example
from rflow_jax.errors import InputError

_LARGEST_MEAN = 2**21  # bytes of a record; a buffer of larger ones holds fewer, so that its memory stays bounded
_FIRST_FILL = 16  # records of a subset to read before its first sample is drawn; later ones need more


class StreamJob:
    """A sample to be made. Only the record is pickled for a worker, not its possible replacements."""

    def __init__(self, number: int, raw: RawSample, spares: Sequence[BufferedSample] = ()):
        self.number, self.raw, self.spares = number, raw, spares

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamJob, (self.number, self.raw)


@dataclass(frozen=True)
class StreamCollator:
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
        errors: of what was read since they were last reported; who reports them empties the list.

    Args:
        wanted: subsets that are drawn from; others are not kept.
        size: records of each subset.
    """

    def __init__(self, stream: RecordStream, route: ShardAssignment, wanted: Sequence[str], size: int, seed: int):
        self._stream, self._route, self._size, self._seed = stream, route, size, seed
        self._items: dict[str, list[BufferedSample]] = {name: [] for name in wanted}
        self._bytes = dict.fromkeys(wanted, 0)
        self._drawn = dict.fromkeys(wanted, 0)
        self._seen = dict.fromkeys(wanted, 0)  # in this epoch
        self._in_epoch: dict[str, int] | None = None  # in the one before
        self._without = dict.fromkeys(wanted, 0)  # shards since the last one of it
        self.errors: list[str] = []

    def draw(self, subset: str, number: int) -> StreamJob:
        """Takes a random record of a subset out of its buffer; raises InputError if no shard has one."""
        items = self._items[subset]
        while True:
            # More and more, so that the first sample does not wait for a full buffer.
            most = self._size if self._in_epoch is None else min(self._size, self._in_epoch[subset])
            enough = max(1, min(most, _FIRST_FILL + self._drawn[subset]))
            if len(items) >= enough or self._bytes[subset] >= enough * _LARGEST_MEAN:
                break
            self._read_on(subset)
        word = int(random_words(self._seed, BUFFER, (number, 0), 1)[0])
        chosen = items.pop(word % len(items))
        self._bytes[subset] -= chosen.raw.nbytes
        self._drawn[subset] += 1
        return StreamJob(number, chosen.raw, tuple(items))

    def snapshot(self) -> dict[str, Any]:
        """The state that the next draws depend on, as JSON."""
        return {
            "place": list(self._stream.position),
            "items": {name: [list(item.position) for item in items] for name, items in self._items.items()},
            "drawn": dict(self._drawn),
            "seen": dict(self._seen),
            "in_epoch": self._in_epoch and dict(self._in_epoch),
            "without": dict(self._without),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Reads the buffers' records again; the stream is at the snapshot's position already.

        Raises:
            InputError: a record is missing, or the snapshot is unusable.
        """
        try:
            kept = {name: [StreamPosition(*item) for item in snapshot["items"][name]] for name in self._items}
            self._drawn, self._seen = dict(snapshot["drawn"]), dict(snapshot["seen"])
            self._in_epoch, self._without = snapshot["in_epoch"], dict(snapshot["without"])
        except (KeyError, TypeError) as error:
            raise InputError(f"the checkpoint's data position is not one of these subsets' stream ({error})") from error
        found = self._stream.items([position for positions in kept.values() for position in positions])
        self._items = {name: [found[position] for position in positions] for name, positions in kept.items()}
        self._bytes = {name: sum(item.raw.nbytes for item in items) for name, items in self._items.items()}

    def _read_on(self, wanted: str) -> None:
        """Reads one more sample into its buffer."""
        found = self._stream.read()
        if found is None:
            self._end_shard(wanted)
            return
        (epoch, shard, sample), raw = found
        if raw.trouble:
            if epoch == 0 or not raw.key:  # a bad sample is reported once, a bad shard in each epoch
                self.errors.append(f"{raw.key} {raw.trouble}".strip())
        elif (items := self._items.get(raw.subset)) is not None:
            self._seen[raw.subset] += 1
            self._without[raw.subset] = 0
            before = self._bytes[raw.subset]
            self._bytes[raw.subset] += raw.nbytes
            if len(items) < self._size and before < self._size * _LARGEST_MEAN:
                items.append(BufferedSample(*found))
            else:
                word = int(random_words(self._seed, REPLACEMENT, (epoch << 32 | shard, 1 + sample), 1)[0])
                self._bytes[raw.subset] -= items[word % len(items)].raw.nbytes
                items[word % len(items)] = BufferedSample(*found)

    def _end_shard(self, subset: str) -> None:
        if self._stream.position[1:] == (0, 0):
            self._in_epoch, self._seen = self._seen, dict.fromkeys(self._seen, 0)
        for name in self._without:
            self._without[name] += 1
        if not self._items[subset] and self._without[subset] >= self._route.patience:
            last = f" ({self.errors[-1]})" if self.errors else ""
            raise InputError(f"split_ratios.{subset}: positive, but there are no records of it{last}; set it to 0")


class StreamSampler:
    """The plan of one process, drawn from its buffers; steps must be asked for in order."""

    def __init__(
        self, choice: SubsetSchedule, buffers: Buffers, share: ProcessShare, fingerprint: str, start: int, kept: int
    ):
        self._choice, self._buffers, self._share, self._fingerprint = choice, buffers, share, fingerprint
        self._kept = kept
        self._snapshots: dict[int, dict[str, Any]] = {start: buffers.snapshot()}
        self._errors: dict[int, list[str]] = {}
        self._counted = 0, np.zeros(len(SUBSETS), np.int64)

    def jobs(self, step: int) -> list[StreamJob]:
        self._snapshots[step] = self._buffers.snapshot()
        self._snapshots.pop(step - self._kept, None)
        first = step * self._choice.batch_size
        subsets = self._choice.subsets(first, first + self._choice.batch_size)
        jobs = [self._buffers.draw(SUBSETS[subsets[slot]], first + slot) for slot in self._share.slots]
        self._errors[step], self._buffers.errors = self._buffers.errors, []
        return jobs

    def replacement(self, job: StreamJob, attempt: int) -> StreamJob:
        """Another record of the same buffer, which stays there: later draws do not depend on it.

        Raises:
            InputError: there was no other.
        """
        if not job.spares:
            raise InputError(f"{job.raw.key} cannot be used, and no other of {job.raw.subset} is in the buffer")
        word = int(random_words(self._choice.seed, REPLACEMENT, (job.number, 0), 1)[0])
        return StreamJob(job.number, job.spares[(word + attempt) % len(job.spares)].raw, job.spares)

    def pop_errors(self, step: int) -> list[str]:
        """The errors of what was read for a step; a second call returns none."""
        return self._errors.pop(step, [])

    def drawn(self, step: int) -> dict[str, int]:
        number = step * self._choice.batch_size
        before, counts = self._counted if self._counted[0] <= number else (0, np.zeros(len(SUBSETS), np.int64))
        counts = counts + np.bincount(self._choice.subsets(before, number), minlength=len(SUBSETS))
        self._counted = number, counts
        return dict(zip(SUBSETS, counts.tolist(), strict=True))

    def position(self, step: int) -> dict[str, Any]:
        """The position of this process, for a recent step; :func:`merge_positions` merges those of all processes."""
        common = {"number": step * self._choice.batch_size, "drawn": self.drawn(step), "fingerprint": self._fingerprint}
        return common | {"streams": {self._share.name: self._snapshots[step]}}


class StreamLoader(Loader):
    """Batches of a stream; its damaged parts count as skipped."""

    def _batch(self, numbers: np.ndarray, examples: list[Any], common_fields: dict[str, Any], /) -> Any:
        assert isinstance(self._plan, StreamSampler)
        errors = self._plan.pop_errors(common_fields["step"])
        self._skip(errors)
        return super()._batch(numbers, examples, common_fields | {"skipped": errors + common_fields["skipped"]})


def merge_positions(positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the positions of all processes; only those of streams differ."""
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

    A resumed run needs its position, and reads again the shards whose records were in its buffers.

    Raises:
        InputError: no shard can be read, or the position is of another stream or number of processes.
    """
    choice = SubsetSchedule(config.split_ratios, config.training_stages, seed, batch_size)
    shards = expand(config.path, allow_shell=config.allow_shell, retry=config.retry)
    identity = [[shard.name, shard.size] for shard in shards]
    fingerprint = hashlib.sha256(json.dumps(["stream", identity]).encode()).hexdigest()[:32]
    require_same_records(position, fingerprint)
    share = ProcessShare.of(slots, batch_size)
    snapshot = None
    if position is not None:
        streams = position.get("streams", {})
        if share.name not in streams:
            raise InputError(
                f"data.format is stream: the run had {len(streams)} processes with other samples; use as many as it had"
            )
        snapshot = streams[share.name]
    elif start:
        raise InputError(f"data.format is stream: cannot begin at step {start} without the position of a run")
    route = ShardAssignment(shards, share, seed)
    begin = StreamPosition(*snapshot["place"]) if snapshot else StreamPosition(0, 0, 0)
    buffers = Buffers(RecordStream(route, config.retry, begin), route, choice.wanted, config.shuffle_buffer_size, seed)
    if snapshot:
        buffers.restore(snapshot)
    plan = StreamSampler(choice, buffers, share, fingerprint, start, kept=config.prefetch + 16)
    return StreamLoader(plan, StreamCollator(config, seed), config, start)
