"""Indexes of GenRef's tars: members, grouped to samples the way WebDataset does."""

from __future__ import annotations

import os
import random
import re
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tarfile import ReadError, TarFile, TarInfo
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np

from rflow_jax.data.records import SUBSETS, Record, RecordError
from rflow_jax.data.sources.index_cache import ShardIndex, Troubles, claimed, load_index, save_index
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import LARGE_BLOCK, RangeFile, Shard
from rflow_jax.errors import InputError
from rflow_jax.utils.progress import count_progress

T = TypeVar("T")

MEMBERS = ("good_image", "bad_image", "prompt.txt", "reflection.txt", "subset.txt")
GOOD, BAD, PROMPT, REFLECTION, SUBSET = range(len(MEMBERS))
_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}
# The same split as webdataset.tariterators.base_plus_ext: the key ends at the first dot of the base name.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")

# A plain TarFile takes these for the end of the archive. They are missing in the type stubs.
_BAD_HEADERS: tuple[type[Exception], ...] = tuple(
    getattr(tarfile, name) for name in ("InvalidHeaderError", "TruncatedHeaderError", "EmptyHeaderError")
)


class DamagedTar(Exception):
    """A tar that cannot be read further; says why."""


@dataclass
class TarSample(Generic[T]):
    """Members with the same key.

    Attributes:
        found: the content of each of :data:`MEMBERS`, or None.
        twice: one of them that was there again.
    """

    key: str
    found: list[T | None]
    twice: str = ""

    @property
    def missing(self) -> list[str]:
        """The members that it lacks."""
        return [name for name, one in zip(MEMBERS, self.found, strict=True) if one is None]

    @property
    def trouble(self) -> str:
        """Why it cannot be used; empty if it can."""
        if self.twice:
            return f"has two of {self.twice}"
        return f"has no {' and no '.join(self.missing)}" if self.missing else ""

    def completes(self, other: TarSample[T]) -> bool:
        """Whether both lack members, and have none in common."""
        one_of_each = not any(a is not None and b is not None for a, b in zip(self.found, other.found, strict=True))
        return bool(self.missing and other.missing) and not self.twice and not other.twice and one_of_each


class _Header(TarInfo):
    """A header that raises when it is damaged or truncated, instead of ending the tar."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> TarInfo:
        try:
            return super().fromtarfile(tarfile)
        except _BAD_HEADERS as error:
            raise ReadError(f"{error or 'no end mark'} at byte {vars(tarfile)['offset']}") from None


def open_tar(file: Any, *, stream: bool) -> TarFile:
    """A tar whose damage raises an error; a stream need not be seekable, and may be compressed.

    Raises:
        DamagedTar: it does not begin like a tar.
    """
    try:
        return tarfile.open(fileobj=file, mode="r|*" if stream else "r:", tarinfo=_Header)
    except tarfile.TarError as error:
        raise DamagedTar(f"not a tar file ({error})") from error


def headers(tar: TarFile) -> Iterator[TarInfo]:
    """The regular files of a tar, in constant memory; raises DamagedTar where it is damaged or truncated."""
    try:
        while (header := tar.next()) is not None:
            vars(tar)["members"] = []  # it would keep them all
            if header.isreg() and not header.issparse():
                yield header
    except (tarfile.TarError, EOFError) as error:
        raise DamagedTar(str(error)) from error


def samples(members: Iterable[tuple[str, T]]) -> Iterator[TarSample[T]]:
    """Groups consecutive (name, content) members; those of other data sets and lone files are left out."""
    current: TarSample[T] | None = None
    for name, content in members:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        key, rest = match[1], match[2].lower()
        stem, _, extension = rest.rpartition(".")
        name = stem if extension in _EXTENSIONS else rest
        if current is not None and key != current.key:
            yield current
            current = None
        if name not in MEMBERS:
            continue
        member = MEMBERS.index(name)
        if current is None:
            current = TarSample(key, [None] * len(MEMBERS))
        if current.found[member] is not None:
            current.twice = MEMBERS[member]
        current.found[member] = content
    if current is not None:
        yield current


def gathered(members: Iterable[tuple[str, T]]) -> tuple[list[TarSample[T]], TarSample[T] | None]:
    """As :func:`samples`, with members of a sample that lie apart put together.

    Returns:
        The samples in the order of their first members, and the one that the last member belongs to.
    """
    found: list[TarSample[T]] = []
    partial: dict[str, TarSample[T]] = {}
    last = None
    for run in samples(members):
        last = partial.get(run.key)
        if last is not None and last.completes(run):
            last.found = [a if a is not None else b for a, b in zip(last.found, run.found, strict=True)]
            continue
        found.append(run)
        last = run
        if run.missing:
            partial[run.key] = run
    return found, last


def subset_of(text: bytes) -> int | None:
    """The index in :data:`~rflow_jax.data.records.SUBSETS` of the content of a ``subset.txt``; None if unknown."""
    name = text.decode("utf-8", "replace").strip()
    return SUBSETS.index(name) if name in SUBSETS else None


def make_record(key: str, subset: str, members: list[bytes]) -> Record:
    """A record from the contents of its members.

    Raises:
        RecordError: a text is not UTF-8, or an image is empty.
    """
    for member in (GOOD, BAD):
        if not members[member]:
            raise RecordError(f"{key}: {MEMBERS[member]} is empty")
    try:
        prompt, reflection = members[PROMPT].decode(), members[REFLECTION].decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{key}: a text is not UTF-8 ({error})") from error
    return Record(key, subset, prompt, reflection, members[GOOD], members[BAD])


_LONGEST_SUBSET = 64
_NAMED = 5  # unusable samples to name
_BUFFER = 8192


_File = BinaryIO | RangeFile


class _Extent(NamedTuple):
    start: int
    size: int
    subset: int | None = None


def index_shards(
    shards: Sequence[Shard], cache: Path, *, retry: RetryPolicy = RetryPolicy(), threads: int = 16, show: bool = True
) -> list[ShardIndex]:
    """An index of each shard: from the cache, or else from the shard's headers.

    Args:
        cache: folder of cached indexes, one file per shard; a damaged one is rebuilt. Processes with the same cache
            share the work.
        threads: shards read at once.
        show: draw a progress bar.

    Raises:
        InputError: a shard is not a tar, is missing, does not answer, or cannot be read by range.
    """
    if pipes := [shard.shown for shard in shards if shard.is_pipe]:
        raise InputError(f"{pipes[0]}: a pipe cannot be indexed; stream it")
    known = {shard: found for shard in shards if (found := load_index(shard, cache)) is not None}
    remote = [shard for shard in shards if shard not in known and not shard.is_local]
    if show and remote:
        print(_cost(remote, cache), file=sys.stderr)
    with count_progress(show) as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task("Indexing shards", total=len(shards), completed=len(known))

        ended = threading.Event()

        def index(shard: Shard) -> ShardIndex:
            with claimed(shard, cache, ended):
                found = load_index(shard, cache)  # another process may have made it meanwhile
                if found is None:
                    found = build_index(shard, retry)
                    save_index(found, shard, cache)
            progress.advance(task)
            return found

        todo = [shard for shard in shards if shard not in known]
        random.shuffle(todo)  # so that processes with one cache share the work
        futures = {shard: pool.submit(index, shard) for shard in todo}
        try:
            return [known[shard] if shard in known else futures[shard].result() for shard in shards]
        except BaseException:
            ended.set()
            pool.shutdown(cancel_futures=True)
            raise


def _cost(shards: Sequence[Shard], cache: Path) -> str:
    """What an index of remote shards takes, at most: larger members than GenRef's are not read."""
    size = sum(shard.size or 0 for shard in shards)
    requests = sum(-(-(shard.size or 0) // LARGE_BLOCK) for shard in shards)
    return (
        f"indexing {len(shards)} remote shards, once: up to {size / 1e9:,.1f} GB in {requests:,} requests, "
        f"{size / 1e8 / 60:,.0f} minutes at 100 MB/s; shard by shard kept in {cache}"
    )


def build_index(shard: Shard, retry: RetryPolicy = RetryPolicy()) -> ShardIndex:
    """Reads the headers and ``subset.txt`` of each sample, but no image; raises as :func:`index_shards`."""
    with _open(shard, retry) as file:
        try:
            tar = open_tar(file, stream=False)
        except DamagedTar as error:
            raise InputError(f"{shard.shown}: {error}; fetch it again, or stream it if it is compressed") from error
        troubles = Troubles()
        keys, offsets, sizes, subsets = [], [], [], []
        found, last = gathered(_extents(tar, file, troubles))
    for sample in found:
        extents = [extent or _Extent(0, 0) for extent in sample.found]
        trouble = sample.trouble or ("has an unknown subset" if extents[SUBSET].subset is None else "")
        if not trouble:
            keys.append(sample.key.encode("utf-8", "surrogateescape"))
            offsets.append([extent.start for extent in extents])
            sizes.append([extent.size for extent in extents])
            subsets.append(extents[SUBSET].subset)
        elif not (troubles.damage and sample is last and sample.missing):  # the one at the cut is the damage
            troubles.samples += 1
            if len(troubles.named) < _NAMED:
                troubles.named.append(f"{sample.key} {trouble}")
    return ShardIndex(
        np.frombuffer(b"".join(keys), np.uint8),
        np.cumsum([len(key) for key in keys], dtype=np.int64),
        np.asarray(offsets, np.int64).reshape(-1, len(MEMBERS)),
        np.asarray(sizes, np.int64).reshape(-1, len(MEMBERS)),
        np.asarray(subsets, np.uint8),
        troubles,
    )


def _open(shard: Shard, retry: RetryPolicy) -> _File:
    if not shard.is_local:
        return RangeFile(shard, retry)
    try:
        file = open(shard.url, "rb", buffering=_BUFFER)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise InputError(f"{shard.url}: cannot be read ({error.strerror})") from error
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # read-ahead would fetch the images
    return file


def _extents(tar: tarfile.TarFile, file: _File, troubles: Troubles) -> Iterator[tuple[str, _Extent]]:
    """Name and byte extent of each member, up to where the tar is damaged."""
    total = file.seek(0, os.SEEK_END)
    try:
        for header in headers(tar):
            if header.offset_data + header.size > total:
                raise DamagedTar(f"cut at byte {total}")
            subset = None
            if header.name.lower().endswith(MEMBERS[SUBSET]) and header.size <= _LONGEST_SUBSET:
                file.seek(header.offset_data)
                subset = subset_of(file.read(header.size))
            yield header.name, _Extent(header.offset_data, header.size, subset)
    except DamagedTar as error:
        troubles.damage = str(error)
