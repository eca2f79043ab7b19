"""Indexes of GenRef's tars: where the members of each sample lie."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tarfile import TarFile
from typing import BinaryIO, NamedTuple

import numpy as np

from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sources.tar_members import (
    LARGEST,
    MEMBERS,
    SUBSET,
    DamagedTar,
    MemberName,
    headers,
    open_tar,
    samples,
    subset_of,
)
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import RangeFile, Shard
from rflow_jax.errors import InputError
from rflow_jax.utils.files import OF_THE_MACHINE, open_regular
from rflow_jax.utils.json_files import parse_json
from rflow_jax.utils.progress import count_progress

log = logging.getLogger(__name__)

_FORMAT = 1
_NAMED = 5  # unusable samples to name
_BUFFER = 8192
_NO_INDEX = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, tokenize.TokenError),  # NumPy's headers are Python
)
_LARGEST_INDEX = 2**32  # bytes; a sample has about 130


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
            found = _load(file, shard)
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


def _extents(tar: TarFile, file: _File, troubles: Troubles) -> Iterator[tuple[MemberName, _Extent, str]]:
    """Name and byte extent of each member, and what is wrong with it, up to where the tar is damaged."""
    total = file.seek(0, os.SEEK_END)
    try:
        for header in headers(tar):
            if header.offset_data + header.size > total:
                raise DamagedTar(f"cut at byte {total}")
            if (name := MemberName.of(header.name)) is None:
                continue
            subset = None
            if name.member == SUBSET and header.size <= LARGEST[SUBSET]:
                file.seek(header.offset_data)
                subset = subset_of(file.read(header.size))
            yield name, _Extent(header.offset_data, header.size, subset), name.excess(header.size)
    except DamagedTar as error:
        troubles.damage = str(error)


def _load(file: Path, shard: Shard) -> ShardIndex | None:
    if not file.exists():
        return None
    try:
        with open_regular(file, "index", _LARGEST_INDEX) as content:
            with zipfile.ZipFile(content) as archive:  # which may unpack to any size
                if sum(member.file_size for member in archive.infolist()) > _LARGEST_INDEX:
                    raise InputError(f"more than {_LARGEST_INDEX:,} bytes when unpacked")
            content.seek(0)
            with np.load(content, allow_pickle=False) as arrays:
                troubles = Troubles(**parse_json(arrays["troubles"].tobytes(), "troubles"))
                named = {name: arrays[name] for name in arrays.files if name != "troubles"}
        index = ShardIndex(**named, troubles=troubles)
        _require_fit(index, shard)
        return index
    except _NO_INDEX as error:
        if getattr(error, "errno", None) in OF_THE_MACHINE:
            raise
        log.warning("%s: damaged, so the shard is indexed again (%s)", file, error)
        return None


def _require_fit(index: ShardIndex, shard: Shard) -> None:
    """Raises ValueError for arrays that are not an index of this shard."""
    rows, troubles = len(index.subsets), index.troubles
    shapes = index.key_ends.shape, index.offsets.shape, index.sizes.shape, index.subsets.shape
    if shapes != ((rows,), (rows, len(MEMBERS)), (rows, len(MEMBERS)), (rows,)) or index.keys.ndim != 1:
        raise ValueError("arrays of other shapes")
    if not all(array.dtype == np.int64 for array in (index.key_ends, index.offsets, index.sizes)):
        raise ValueError("arrays of other types")
    if index.keys.dtype != np.uint8 or index.subsets.dtype != np.uint8:
        raise ValueError("arrays of other types")
    kinds = type(troubles.samples), type(troubles.named), type(troubles.damage)
    if kinds != (int, list, str) or not all(isinstance(one, str) for one in troubles.named):
        raise ValueError("troubles of other types")
    if not rows:
        return
    largest = np.asarray(LARGEST)
    fits = index.offsets.min() >= 0 and index.sizes.min() >= 0 and (index.sizes <= largest).all()
    fits = fits and (shard.size is None or (index.offsets <= shard.size - index.sizes).all())
    ends = np.diff(index.key_ends, prepend=0)
    if not (fits and index.subsets.max() < len(SUBSETS) and ends.min() >= 0 and index.key_ends[-1] == len(index.keys)):
        raise ValueError("numbers that do not fit the shard")


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
