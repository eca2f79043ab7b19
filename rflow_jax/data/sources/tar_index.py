"""Indexes of GenRef's tars: where the members of each sample lie."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tarfile import BLOCKSIZE, TarFile
from typing import BinaryIO, NamedTuple

import numpy as np

from rflow_jax.data.sources.index_cache import ShardIndex, Troubles, claimed, load_index, save_index
from rflow_jax.data.sources.tar_members import (
    LARGEST,
    MEMBERS,
    SUBSET,
    DamagedTar,
    MemberName,
    gathered,
    headers,
    open_tar,
    subset_of,
)
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import LARGE_BLOCK, RangeFile, Shard
from rflow_jax.errors import InputError
from rflow_jax.utils.file_kinds import stand_in_of
from rflow_jax.utils.progress import count_progress

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
            file.seek(0)
            what = stand_in_of(file.read(BLOCKSIZE)) or f"{error}; fetch it again, or stream it if it is compressed"
            raise InputError(f"{shard.shown}: {what}") from error
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
