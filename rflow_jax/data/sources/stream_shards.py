"""The records that one process reads from a stream of shards, and their order.

Processes split the shards of an epoch, and the split rotates from epoch to epoch. With fewer shards than processes, all
read all shards and each of n processes keeps every n-th record.
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
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple

import numpy as np

from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sampling import SHARD_ORDER, random_words
from rflow_jax.data.sources.tar_members import (
    LARGEST,
    LARGEST_SKIPPED,
    SUBSET,
    DamagedTar,
    MemberName,
    content_of,
    headers,
    open_tar,
    samples,
    subset_of,
)
from rflow_jax.data.storage.http import at_most, http_get
from rflow_jax.data.storage.retry import RetryPolicy, TransientError, is_http, with_retries
from rflow_jax.data.storage.shards import PIPE, RangeFile, Shard
from rflow_jax.errors import InputError
from rflow_jax.utils.file_kinds import stand_in


class StreamPosition(NamedTuple):
    """The position of a record in the stream of one process.

    Attributes:
        epoch: how often all shards have been read before.
        shard: its number in this epoch's order.
        sample: its number in the shard.
    """

    epoch: int
    shard: int
    sample: int


class BufferedSample(NamedTuple):
    """A record in a buffer."""

    position: StreamPosition
    raw: RawSample


@dataclass(frozen=True)
class ProcessShare:
    """One process's share of the samples (``slots``) and of the stream (``own``, out of ``parts``)."""

    slots: tuple[int, ...]
    own: frozenset[int]
    parts: int

    @classmethod
    def of(cls, slots: Sequence[int], batch_size: int) -> ProcessShare:
        """The share of a process; depends on the slots alone, so that equal slots read equal records."""
        size, first = len(slots), slots[0]
        if list(slots) == list(range(first, first + size)) and batch_size % size == 0 and first % size == 0:
            return cls(tuple(slots), frozenset([first // size]), batch_size // size)
        return cls(tuple(slots), frozenset(slots), batch_size)

    @property
    def name(self) -> str:
        """The key of this process in a position."""
        return ",".join(map(str, self.slots))


class ShardAssignment:
    """Assigns shards and records to one process, epoch by epoch."""

    def __init__(self, shards: Sequence[Shard], share: ProcessShare, seed: int):
        self._shards, self._share, self._seed = shards, share, seed
        self._dealt = len(shards) >= share.parts

    @property
    def patience(self) -> int:
        """The number of shards without a record of a subset after which there is none."""
        return (1 + (self._share.parts > 1) * self._share.parts) * len(self._shards) + 1

    def shards(self, epoch: int) -> list[Shard]:
        """The shards of an epoch, in order. Over as many epochs as there are parts, each process reads all."""
        turn = epoch // self._share.parts if self._dealt else epoch
        words = random_words(self._seed, SHARD_ORDER, (turn, 0), len(self._shards))
        order = np.argsort(words, kind="stable").tolist()
        return [self._shards[i] for n, i in enumerate(order) if not self._dealt or self._is_own(n + epoch)]

    def takes(self, position: StreamPosition, number: int) -> bool:
        """Whether this process takes the record with this number in its subset and shard."""
        return self._dealt or self._is_own(number + position.epoch)

    def _is_own(self, number: int) -> bool:
        return number % self._share.parts in self._share.own


class RecordStream:
    """The endless records of one process, from any position on; ``position`` is that of the next sample."""

    def __init__(self, route: ShardAssignment, retry: RetryPolicy, position: StreamPosition = StreamPosition(0, 0, 0)):
        self._route, self._retry, self.position = route, retry, position
        self._open: Iterator[tuple[StreamPosition, RawSample]] | None = None
        self._shards = route.shards(position.epoch)

    def read(self) -> tuple[StreamPosition, RawSample] | None:
        """The next sample with its position; None at the end of a shard."""
        if self._open is None:
            self._open = self._read(self.position)
        found = next(self._open, None)
        if found is not None:
            self.position = found[0]._replace(sample=found[0].sample + 1)
            return found
        self._open = None
        epoch, shard, _ = self.position
        self.position = StreamPosition(epoch, shard + 1, 0)
        if self.position.shard >= len(self._shards):
            self.position = StreamPosition(epoch + 1, 0, 0)
            self._shards = self._route.shards(epoch + 1)
        return None

    def items(self, positions: Sequence[StreamPosition]) -> dict[StreamPosition, BufferedSample]:
        """Reads the records at these positions again; raises InputError if one is missing."""
        found: dict[StreamPosition, BufferedSample] = {}
        for epoch, shard in sorted({position[:2] for position in positions}):
            wanted = {position for position in positions if position[:2] == (epoch, shard)}
            begin = StreamPosition(epoch, shard, 0)
            for position, raw in RecordStream(self._route, self._retry, begin)._read(begin):
                if position in wanted and not raw.trouble:
                    found[position] = BufferedSample(position, raw)
                if position.sample >= max(wanted).sample:
                    break
        if missing := set(positions) - found.keys():
            shard = self._route.shards(min(missing).epoch)[min(missing).shard]
            raise InputError(f"{shard.shown}: sample {min(missing).sample} is gone, so the run cannot be resumed")
        return found

    def _read(self, begin: StreamPosition) -> Iterator[tuple[StreamPosition, RawSample]]:
        """The samples of a shard that this process takes, from ``begin`` on."""
        shard = self._shards[begin.shard]
        counts: dict[str, int] = dict.fromkeys(SUBSETS, 0)
        for number, raw in enumerate(read_shard(shard, self._retry)):
            position = begin._replace(sample=number)
            taken = bool(raw.trouble) or self._route.takes(position, counts[raw.subset])
            if not raw.trouble:
                counts[raw.subset] += 1
            if taken and number >= begin.sample:
                yield position, raw


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

    @property
    def nbytes(self) -> int:
        """Bytes of its members."""
        return sum(map(len, self.members))


def read_shard(shard: Shard, retry: RetryPolicy) -> Iterator[RawSample]:
    """The samples of a shard.

    After a broken connection it is read from the beginning again, and earlier samples are skipped. If the rest cannot
    be read, the last sample has no key and says why: damage, or no answer.
    """
    reader: Iterator[RawSample] | None = None
    done = 0

    def following() -> RawSample | None:
        nonlocal reader
        if reader is None:
            reader = _read_once(shard, retry, done)
        try:
            return next(reader, None)
        except TransientError:
            reader = None
            raise

    try:
        while (raw := with_retries(following, shard.url, retry)) is not None:
            yield raw
            done += 1
    except InputError as error:
        yield RawSample("", "", [], str(error))
    finally:
        if reader is not None:
            reader.close()  # pyright: ignore[reportAttributeAccessIssue]


def _read_once(shard: Shard, retry: RetryPolicy, skip: int) -> Iterator[RawSample]:
    damage: list[str] = []
    with ExitStack() as stack:
        file = _open(shard, retry, stack)
        number = 0
        for sample in samples(_members(file, damage)):
            if damage and "has no" in sample.trouble:  # the one at the cut is the damage
                break
            number += 1
            if number > skip:
                named = sample.found[SUBSET]
                subset = None if named is None else subset_of(named)
                if sample.trouble or subset is None:
                    yield RawSample(sample.key, "", [], sample.trouble or "has an unknown subset")
                else:
                    yield RawSample(sample.key, SUBSETS[subset], [content or b"" for content in sample.found])
    if damage and number >= skip:
        what = stand_in(Path(shard.url)) if shard.is_local and not number else None
        yield RawSample("", "", [], f"{shard.shown}: {what or f'{damage[0]}; {number} samples before it'}")


def _members(file: Any, damage: list[str]) -> Iterator[tuple[MemberName, bytes, str]]:
    """Name and content of each member, and what is wrong with it, up to where the tar is damaged.

    Only what a sample may consist of is read.
    """
    try:
        with closing(open_tar(file, stream=True)) as tar:
            for header in headers(tar):
                if header.size > LARGEST_SKIPPED:
                    raise DamagedTar(
                        f"{header.name[:100]} has {header.size:,} bytes; {LARGEST_SKIPPED:,} are passed over at most"
                    )
                if (name := MemberName.of(header.name)) is None:
                    continue
                content = b""
                if name.member is not None and header.size <= LARGEST[name.member]:
                    content = content_of(tar, header)
                    if len(content) != header.size:
                        raise DamagedTar(f"cut in {header.name[:100]}")
                yield name, content, name.excess(header.size)
    except (DamagedTar, *_DAMAGE) as error:
        damage.append(str(error) or type(error).__name__)


def _open(shard: Shard, retry: RetryPolicy, stack: ExitStack) -> Any:
    """A readable file of a shard, to be closed by the stack."""
    if shard.is_pipe:
        return _Pipe(shard, retry, stack)
    if is_http(shard.url):
        response, chunks = stack.enter_context(http_get(shard.url, {}, retry))
        if response.status_code != 200:
            raise TransientError(f"status {response.status_code}")
        return _Chunks(chunks if shard.size is None else at_most(shard.size, chunks, shard.url))
    if not shard.is_local:
        return RangeFile(shard, retry)
    try:
        return stack.enter_context(open(shard.url, "rb", buffering=_BLOCK))
    except OSError as error:
        raise InputError(f"{shard.url}: cannot be read ({error.strerror})") from error


class _Chunks:
    """A file of chunks of any size."""

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
    """The output of a shell command, which is killed if it is silent too long or not read to its end."""

    def __init__(self, shard: Shard, retry: RetryPolicy, stack: ExitStack):
        self._shard, self._retry = shard, retry
        command = shard.url.removeprefix(PIPE)
        # In its own session, so that everything the shell has started ends with it.
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
        if not self._ready.select(self._retry.timeout):
            raise TransientError(f"no byte for {self._retry.timeout:g} s")
        data = os.read(self._fd, _BLOCK)
        if not data:
            try:
                status = self._process.wait(self._retry.timeout)
            except subprocess.TimeoutExpired as error:
                raise TransientError("the command does not end") from error
            if status:
                raise TransientError(f"the command ended with status {status}")
        return data

    def _end(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
