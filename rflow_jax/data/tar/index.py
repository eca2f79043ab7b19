"""Where the members of each sample lie in a shard: found in one pass over its headers, and kept for the next time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from rflow_jax.data.storage.patience import Patience
from rflow_jax.data.storage.ranges import RangeFile
from rflow_jax.data.storage.shards import Shard
from rflow_jax.data.tar.members import MEMBERS, SUBSET, DamagedTar, Sample, headers, open_tar, samples, subset_of
from rflow_jax.errors import InputError
from rflow_jax.progress import count_progress

log = logging.getLogger(__name__)

_FORMAT = 1
_LONGEST_SUBSET = 64
_NAMED = 5  # samples that are named, of those that cannot be used
_BUFFER = 8192


@dataclass
class Troubles:
    """What cannot be used of a shard.

    Attributes:
        samples: how many samples.
        named: the first of them, and why.
        damage: why the shard cannot be read to its end; empty if it can.
    """

    samples: int = 0
    named: list[str] = field(default_factory=list)
    damage: str = ""

    def add(self, sample: Sample[Any]) -> None:
        """Counts a sample, and names it if it is one of the first."""
        self.samples += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{sample.key} {sample.trouble}")


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, n of them.

    Attributes:
        keys: their names, one after the other in UTF-8.
        key_ends: [n] int64; where each ends in ``keys``.
        offsets: [n, 5] int64; the first byte of each member, in the order of ``MEMBERS``.
        sizes: [n, 5] int64; bytes of each member.
        subsets: [n] uint8; places in ``SUBSETS``.
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


class _Place(NamedTuple):
    start: int
    size: int
    subset: int | None = None


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/rflow_jax/genref``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rflow_jax" / "genref"


def index_shards(
    shards: Sequence[Shard], cache: Path, *, patience: Patience = Patience(), threads: int = 16, show: bool = True
) -> list[ShardIndex]:
    """An index of each shard: from the cache, or else from the shard's headers.

    Args:
        cache: folder of the kept indexes, one file a shard; a damaged one is made anew.
        threads: shards read at once.
        show: draw a progress bar.

    Raises:
        InputError: a shard is no tar, is gone, does not answer, or cannot be read by range.
    """
    with count_progress(show) as progress, ThreadPoolExecutor(threads) as pool:
        task = progress.add_task("Indexing shards", total=len(shards))

        def index(shard: Shard) -> ShardIndex:
            found = _indexed(shard, cache, patience)
            progress.advance(task)
            return found

        futures = [pool.submit(index, shard) for shard in shards]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _indexed(shard: Shard, cache: Path, patience: Patience) -> ShardIndex:
    if shard.is_pipe:
        raise InputError(f"{shard.shown}: a pipe cannot be indexed; stream it")
    identity = json.dumps([_FORMAT, shard.url, shard.size, shard.version])
    file = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    kept = _load(file)
    if kept is not None:
        return kept
    made = build_index(shard, patience)
    _save(file, made)
    return made


def build_index(shard: Shard, patience: Patience = Patience()) -> ShardIndex:
    """Reads the headers and ``subset.txt`` of each sample, and no picture.

    Raises:
        InputError: as :func:`index_shards`.
    """
    with _open(shard, patience) as file:
        try:
            tar = open_tar(file, stream=False)
        except DamagedTar as error:
            raise InputError(f"{shard.shown}: {error}; fetch it again, or stream it if it is compressed") from error
        troubles = Troubles()
        return _pack(_usable(samples(_places(tar, file, troubles)), troubles), troubles)


def _open(shard: Shard, patience: Patience) -> _File:
    if not shard.is_local:
        return RangeFile(shard, patience)
    try:
        file = open(shard.url, "rb", buffering=_BUFFER)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise InputError(f"{shard.url}: cannot be read ({error.strerror})") from error
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead would fetch the pictures
    return file


def _places(tar: tarfile.TarFile, file: _File, troubles: Troubles) -> Iterator[tuple[str, _Place]]:
    """Name and place of each member, up to where the tar is damaged."""
    total = file.seek(0, os.SEEK_END)
    try:
        for header in headers(tar):
            if header.offset_data + header.size > total:
                raise DamagedTar(f"cut at byte {total}")
            subset = None
            if header.name.lower().endswith(MEMBERS[SUBSET]) and header.size <= _LONGEST_SUBSET:
                file.seek(header.offset_data)
                subset = subset_of(file.read(header.size))
            yield header.name, _Place(header.offset_data, header.size, subset)
    except DamagedTar as error:
        troubles.damage = str(error)


def _usable(found: Iterable[Sample[_Place]], troubles: Troubles) -> Iterator[Sample[_Place]]:
    for sample in found:
        place = sample.found[SUBSET]
        if not sample.trouble and place is not None and place.subset is None:
            sample.trouble = "has an unknown subset"
        if not sample.trouble:
            yield sample
        elif not (troubles.damage and "has no" in sample.trouble):  # the one at the cut is the damage
            troubles.add(sample)


def _pack(usable: Iterable[Sample[_Place]], troubles: Troubles) -> ShardIndex:
    keys, offsets, sizes, subsets = [], [], [], []
    for sample in usable:
        places = [place or _Place(0, 0) for place in sample.found]
        keys.append(sample.key.encode("utf-8", "surrogateescape"))
        offsets.append([place.start for place in places])
        sizes.append([place.size for place in places])
        subsets.append(places[SUBSET].subset)
    return ShardIndex(
        np.frombuffer(b"".join(keys), np.uint8),
        np.cumsum([len(key) for key in keys], dtype=np.int64),
        np.asarray(offsets, np.int64).reshape(-1, len(MEMBERS)),
        np.asarray(sizes, np.int64).reshape(-1, len(MEMBERS)),
        np.asarray(subsets, np.uint8),
        troubles,
    )


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
        os.replace(temporary, file)
    except OSError as error:  # a full or read-only disk costs time at the next start, no more
        log.warning("%s: the index is not kept (%s)", file, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
