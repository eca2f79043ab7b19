"""Indexes of GenRef's tars: members, grouped to samples the way WebDataset does."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tarfile import ReadError, TarFile, TarInfo
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np

from rflow_jax.data.records import SUBSETS, Record, RecordError
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import RangeFile, Shard
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
    """Consecutive members with the same key.

    Attributes:
        found: the content of each of :data:`MEMBERS`, or None.
        trouble: why it cannot be used; empty if it can.
    """

    key: str
    found: list[T | None]
    trouble: str = ""

    def check(self) -> TarSample[T]:
        """Itself, with ``trouble`` set if a member is missing."""
        missing = [name for name, one in zip(MEMBERS, self.found, strict=True) if one is None]
        if missing and not self.trouble:
            self.trouble = f"has no {' and no '.join(missing)}"
        return self


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
            yield current.check()
            current = None
        if name not in MEMBERS:
            continue
        member = MEMBERS.index(name)
        if current is None:
            current = TarSample(key, [None] * len(MEMBERS))
        if current.found[member] is not None:
            current.trouble = f"has two of {MEMBERS[member]}"
        current.found[member] = content
    if current is not None:
        yield current.check()


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


log = logging.getLogger(__name__)

_FORMAT = 1
_LONGEST_SUBSET = 64
_NAMED = 5  # unusable samples to name
_BUFFER = 8192


@dataclass
class Troubles:
    """The unusable parts of a shard.

    Attributes:
        samples: the number of unusable samples.
        named: the first of them, and why.
        damage: why the shard cannot be read to its end; empty if it can.
    """

    samples: int = 0
    named: list[str] = field(default_factory=list)
    damage: str = ""


@dataclass(frozen=True)
class ShardIndex:
    """The n samples of one shard.

    Attributes:
        keys: their names, concatenated in UTF-8.
        key_ends: [n] int64; the end of each in ``keys``.
        offsets: [n, 5] int64; the first byte of each member, in the order of ``MEMBERS``.
        sizes: [n, 5] int64; bytes of each member.
        subsets: [n] uint8; indexes in ``SUBSETS``.
        troubles: what was left out.
    """

    keys: np.ndarray
    key_ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    subsets: np.ndarray
    troubles: Troubles

    def __len__(self) -> int:
        return len(self.subsets)

    def key(self, row: int) -> str:
        """The name of one sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].tobytes().decode("utf-8", "replace")


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
        cache: folder of cached indexes, one file per shard; a damaged one is rebuilt.
        threads: shards read at once.
        show: draw a progress bar.

    Raises:
        InputError: a shard is not a tar, is missing, does not answer, or cannot be read by range.
    """
    with count_progress(show) as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task("Indexing shards", total=len(shards))

        def index(shard: Shard) -> ShardIndex:
            if shard.is_pipe:
                raise InputError(f"{shard.shown}: a pipe cannot be indexed; stream it")
            identity = json.dumps([_FORMAT, shard.url, shard.size, shard.version])
            file = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
            found = _load(file)
            if found is None:
                found = build_index(shard, retry)
                _save(file, found)
            progress.advance(task)
            return found

        futures = [pool.submit(index, shard) for shard in shards]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def build_index(shard: Shard, retry: RetryPolicy = RetryPolicy()) -> ShardIndex:
    """Reads the headers and ``subset.txt`` of each sample, but no image; raises as :func:`index_shards`."""
    with _open(shard, retry) as file:
        try:
            tar = open_tar(file, stream=False)
        except DamagedTar as error:
            raise InputError(f"{shard.shown}: {error}; fetch it again, or stream it if it is compressed") from error
        troubles = Troubles()
        keys, offsets, sizes, subsets = [], [], [], []
        for sample in samples(_extents(tar, file, troubles)):
            extents = [extent or _Extent(0, 0) for extent in sample.found]
            if not sample.trouble and extents[SUBSET].subset is None:
                sample.trouble = "has an unknown subset"
            if not sample.trouble:
                keys.append(sample.key.encode("utf-8", "surrogateescape"))
                offsets.append([extent.start for extent in extents])
                sizes.append([extent.size for extent in extents])
                subsets.append(extents[SUBSET].subset)
            elif not (troubles.damage and "has no" in sample.trouble):  # the one at the cut is the damage
                troubles.samples += 1
                if len(troubles.named) < _NAMED:
                    troubles.named.append(f"{sample.key} {sample.trouble}")
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


def _load(file: Path) -> ShardIndex | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            troubles = Troubles(**json.loads(arrays["troubles"].tobytes()))
            return ShardIndex(**{name: arrays[name] for name in arrays.files if name != "troubles"}, troubles=troubles)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s: damaged, so the shard is indexed again (%s)", file, error)
        return None


def _save(file: Path, index: ShardIndex) -> None:
    arrays = {name: value for name, value in vars(index).items() if name != "troubles"}
    arrays["troubles"] = np.frombuffer(json.dumps(asdict(index.troubles)).encode(), np.uint8)
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".partial", delete=False) as out:
            temporary = out.name
            np.savez(out, **arrays)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as error:  # a full or read-only disk only costs time at the next start
        log.warning("%s: the index is not kept (%s)", file, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
