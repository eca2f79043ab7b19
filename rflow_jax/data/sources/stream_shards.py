"""Which records one process reads from a stream of shards, and in which order.

Processes share the shards of an epoch, each reading its own part; parts move on from epoch to epoch. Where there are
fewer shards than processes, all read all shards and each keeps every n-th record of n processes.
"""

from __future__ import annotations

import lzma
import os
import selectors
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from tarfile import TarError
from typing import Any, NamedTuple

import numpy as np

from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sampling import SHARD_ORDER, random_words
from rflow_jax.data.sources.tar_index import SUBSET, DamagedTar, Sample, headers, open_tar, samples, subset_of
from rflow_jax.data.storage.http import http_get
from rflow_jax.data.storage.retry import RetryPolicy, TransientError, is_http, with_retries
from rflow_jax.data.storage.shards import PIPE, RangeFile, Shard
from rflow_jax.errors import InputError


class StreamPosition(NamedTuple):
    """Where a record lies in the stream of one process.

    Attributes:
        epoch: how often the shards have been gone through before.
        shard: its number in this epoch's order.
        sample: its number in the shard.
    """

    epoch: int
    shard: int
    sample: int


class BufferedSample(NamedTuple):
    """A record in a buffer."""

    place: StreamPosition
    raw: RawSample


@dataclass(frozen=True)
class ProcessShare:
    """The part of the samples and of the stream that is one process's.

    Attributes:
        own: of ``parts`` parts.
    """

    slots: tuple[int, ...]
    own: frozenset[int]
    parts: int

    @classmethod
    def of(cls, slots: Sequence[int], batch_size: int) -> ProcessShare:
        """From the slots alone, so that processes with the same slots read the same."""
        size, first = len(slots), slots[0]
        if list(slots) == list(range(first, first + size)) and batch_size % size == 0 and first % size == 0:
            return cls(tuple(slots), frozenset([first // size]), batch_size // size)
        return cls(tuple(slots), frozenset(slots), batch_size)

    @property
    def name(self) -> str:
        """Of this process's part of a position."""
        return ",".join(map(str, self.slots))


class ShardAssignment:
    """Which records of which shards one process reads, epoch by epoch."""

    def __init__(self, shards: Sequence[Shard], share: ProcessShare, seed: int):
        self._shards, self._share, self._seed = shards, share, seed
        self._dealt = len(shards) >= share.parts

    @property
    def patience(self) -> int:
        """After so many shards without a record of some subset there is none."""
        return (1 + (self._share.parts > 1) * self._share.parts) * len(self._shards) + 1

    def shards(self, epoch: int) -> list[Shard]:
        """The shards of an epoch, in their order. Over as many epochs as there are parts, each process reads all."""
        turn = epoch // self._share.parts if self._dealt else epoch
        words = random_words(self._seed, SHARD_ORDER, (turn, 0), len(self._shards))
        order = np.argsort(words, kind="stable").tolist()
        return [self._shards[i] for n, i in enumerate(order) if not self._dealt or self._is_own(n + epoch)]

    def takes(self, place: StreamPosition, number: int) -> bool:
        """Whether a record is read, that has this number in its subset and shard."""
        return self._dealt or self._is_own(number + place.epoch)

    def _is_own(self, number: int) -> bool:
        return number % self._share.parts in self._share.own


class Stream:
    """The records of one process, one after the other and for ever, from any place on."""

    def __init__(self, route: ShardAssignment, patience: RetryPolicy, place: StreamPosition = StreamPosition(0, 0, 0)):
        self._route, self._patience = route, patience
        self.place = place  # of the next sample
        self._open: Iterator[tuple[StreamPosition, RawSample]] | None = None
        self._shards = route.shards(place.epoch)

    def read(self) -> tuple[StreamPosition, RawSample] | None:
        """The next sample with its place; None at the end of a shard."""
        if self._open is None:
            self._open = self._read(self.place)
        found = next(self._open, None)
        if found is not None:
            self.place = found[0]._replace(sample=found[0].sample + 1)
            return found
        self._open = None
        epoch, shard, _ = self.place
        self.place = StreamPosition(epoch, shard + 1, 0)
        if self.place.shard >= len(self._shards):
            self.place = StreamPosition(epoch + 1, 0, 0)
            self._shards = self._route.shards(epoch + 1)
        return None

    def items(self, places: Sequence[StreamPosition]) -> dict[StreamPosition, BufferedSample]:
        """The records at these places, read again.

        Raises:
            InputError: one is not there any more.
        """
        found: dict[StreamPosition, BufferedSample] = {}
        for epoch, shard in sorted({place[:2] for place in places}):
            wanted = {place for place in places if place[:2] == (epoch, shard)}
            begin = StreamPosition(epoch, shard, 0)
            for place, raw in Stream(self._route, self._patience, begin)._read(begin):
                if place in wanted and not raw.trouble:
                    found[place] = BufferedSample(place, raw)
                if place.sample >= max(wanted).sample:
                    break
        if missing := set(places) - found.keys():
            shard = self._route.shards(min(missing).epoch)[min(missing).shard]
            raise InputError(
                f"{shard.shown}: sample {min(missing).sample} is not there any more, so it cannot be resumed"
            )
        return found

    def _read(self, begin: StreamPosition) -> Iterator[tuple[StreamPosition, RawSample]]:
        """The samples of a shard that this process takes; the numbers of those before are counted."""
        shard = self._shards[begin.shard]
        counts: dict[str, int] = dict.fromkeys(SUBSETS, 0)
        for number, raw in enumerate(read_shard(shard, self._patience)):
            place = begin._replace(sample=number)
            taken = bool(raw.trouble) or self._route.takes(place, counts[raw.subset])
            if not raw.trouble:
                counts[raw.subset] += 1
            if taken and number >= begin.sample:
                yield place, raw


_BLOCK = 1 << 20
_DAMAGE = (TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


class RawSample(NamedTuple):
    """A sample as it was read.

    Attributes:
        members: contents, in the order of ``MEMBERS``; empty if it cannot be used.
        trouble: why it cannot be used; empty if it can.
    """

    key: str
    subset: str
    members: list[bytes]
    trouble: str = ""


def read_shard(shard: Shard, patience: RetryPolicy) -> Iterator[RawSample]:
    """The samples of a shard.

    After a broken connection it is read from its beginning again, and what came before is passed over. What makes the
    rest of it unreadable is its last sample, one with a trouble and without a key: damage, or no answer.
    """
    reader: Iterator[RawSample] | None = None
    done = 0

    def following() -> RawSample | None:
        nonlocal reader
        if reader is None:
            reader = _read_once(shard, patience, done)
        try:
            return next(reader, None)
        except TransientError:
            reader = None
            raise

    try:
        while (raw := with_retries(following, shard.url, patience)) is not None:
            yield raw
            done += 1
    except InputError as error:
        yield RawSample("", "", [], str(error))
    finally:
        if reader is not None:
            reader.close()  # pyright: ignore[reportAttributeAccessIssue]


def _read_once(shard: Shard, patience: RetryPolicy, skip: int) -> Iterator[RawSample]:
    damage: list[str] = []
    with ExitStack() as stack:
        file = _open(shard, patience, stack)
        number = 0
        for sample in samples(_members(file, damage)):
            if damage and "has no" in sample.trouble:  # the one at the cut is the damage
                break
            number += 1
            if number > skip:
                yield _raw(sample)
    if damage and number >= skip:
        yield RawSample("", "", [], f"{shard.shown}: {damage[0]}; {number} samples before it")


def _members(file: Any, damage: list[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member, up to where the tar is damaged."""
    try:
        with closing(open_tar(file, stream=True)) as tar:
            for header in headers(tar):
                opened = tar.extractfile(header)
                content = b"" if opened is None else opened.read()
                if len(content) != header.size:
                    raise DamagedTar(f"cut in {header.name}")
                yield header.name, content
    except (DamagedTar, *_DAMAGE) as error:
        damage.append(str(error) or type(error).__name__)


def _raw(sample: Sample[bytes]) -> RawSample:
    named = sample.found[SUBSET]
    subset = None if named is None else subset_of(named)
    if sample.trouble or subset is None:
        return RawSample(sample.key, "", [], sample.trouble or "has an unknown subset")
    return RawSample(sample.key, SUBSETS[subset], [content or b"" for content in sample.found])


def _open(shard: Shard, patience: RetryPolicy, stack: ExitStack) -> Any:
    """Something to read from; what must be closed again goes onto the stack.

    Raises:
        TransientError: another attempt may help.
        InputError: none will.
    """
    if shard.is_pipe:
        return _Pipe(shard, patience, stack)
    if is_http(shard.url):
        response, chunks = stack.enter_context(http_get(shard.url, {}, patience))
        if response.status_code != 200:
            raise TransientError(f"status {response.status_code}")
        return _Chunks(chunks)
    if not shard.is_local:
        return RangeFile(shard, patience)
    try:
        return stack.enter_context(open(shard.url, "rb", buffering=_BLOCK))
    except OSError as error:
        raise InputError(f"{shard.url}: cannot be read ({error.strerror})") from error


class _Chunks:
    """Pieces of any size as a file."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest, self._at = chunks, b"", 0

    def read(self, size: int) -> bytes:
        pieces, wanted = [], size
        while wanted:
            if self._at == len(self._rest):
                self._rest, self._at = next(self._chunks, b""), 0
                if not self._rest:
                    break
            pieces.append(self._rest[self._at : self._at + wanted])
            self._at += len(pieces[-1])
            wanted -= len(pieces[-1])
        return b"".join(pieces)


class _Pipe:
    """What a shell command writes. It is ended when it is silent for too long, and when it is not read to its end."""

    def __init__(self, shard: Shard, patience: RetryPolicy, stack: ExitStack):
        self._shard, self._patience = shard, patience
        command = shard.url.removeprefix(PIPE)
        # A session of its own, so that all that the shell has started ends with it.
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
        stack.callback(self._end)
        assert self._process.stdout is not None
        self._fd = self._process.stdout.fileno()
        self._ready = stack.enter_context(selectors.DefaultSelector())
        self._ready.register(self._fd, selectors.EVENT_READ)
        self._chunks = _Chunks(iter(self._read_some, b""))

    def read(self, size: int) -> bytes:
        return self._chunks.read(size)

    def _read_some(self) -> bytes:
        if not self._ready.select(self._patience.timeout):
            raise TransientError(f"no byte for {self._patience.timeout:g} s")
        data = os.read(self._fd, _BLOCK)
        if not data and (status := self._status()):
            raise TransientError(f"the command ended with status {status}")
        return data

    def _status(self) -> int:
        try:
            return self._process.wait(self._patience.timeout)
        except subprocess.TimeoutExpired as error:
            raise TransientError("the command does not end") from error

    def _end(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
