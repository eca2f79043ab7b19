"""GenRef in tar shards with random access: about one ranged read for each record."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rflow_jax.data.records import SUBSETS, Record
from rflow_jax.data.sources.index_cache import ShardIndex
from rflow_jax.data.sources.tar_index import index_shards
from rflow_jax.data.sources.tar_members import MEMBERS, make_record
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import Shard, expand, read_range
from rflow_jax.errors import InputError
from rflow_jax.utils.cache import cache_folder

log = logging.getLogger(__name__)

# Members are read together if no more bytes than this are between them: a second request costs more.
_LARGEST_GAP = 1 << 16


class TarSource:
    """The records of indexed shards, in the order of the shards and of their samples; a ``RecordSource``.

    Attributes:
        unusable: the number of samples left out; a warning names some.

    Raises:
        InputError: there is no usable sample.
    """

    def __init__(self, shards: Sequence[Shard], indexes: Sequence[ShardIndex], retry: RetryPolicy = RetryPolicy()):
        self._shards, self._indexes, self._retry = list(shards), list(indexes), retry
        self._ends = np.cumsum([len(index) for index in indexes], dtype=np.int64)
        subsets = np.concatenate([index.subsets for index in indexes]) if indexes else np.zeros(0, np.uint8)
        self._rows = {name: np.flatnonzero(subsets == number) for number, name in enumerate(SUBSETS)}
        self.unusable = sum(index.troubles.samples for index in indexes)
        named = []
        for shard, index in zip(shards, indexes, strict=True):
            if index.troubles.damage:
                log.warning("%s: %s; %d samples before it", shard.shown, index.troubles.damage, len(index))
            named += [f"{shard.shown}: {name}" for name in index.troubles.named]
        if not len(subsets):
            raise InputError(named[0] if named else "the shards contain no sample (KEY.good_image.jpg and so on)")
        if named:
            total = self.unusable + len(subsets)
            log.warning("%d of %d samples cannot be used: %s", self.unusable, total, "; ".join(named[:5]))

    @property
    def counts(self) -> Mapping[str, int]:
        """Records of each subset."""
        return {name: len(rows) for name, rows in self._rows.items()}

    @property
    def fingerprint(self) -> str:
        """A hash of the shards' names, sizes, samples and order, independent of their location."""
        pairs = zip(self._shards, self._indexes, strict=True)
        identity = [[shard.name, shard.size, len(index)] for shard, index in pairs]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def read(self, subset: str, index: int) -> Record:
        """Reads one record.

        Raises:
            RecordError: a text or image of it cannot be used.
            InputError: its shard changed, is missing or does not answer.
        """
        rows = self._rows[subset]
        if not 0 <= index < len(rows):
            raise IndexError(f"{subset} {index}: there are {len(rows)} records")
        number = int(np.searchsorted(self._ends, rows[index], side="right"))
        found = self._indexes[number]
        row = int(rows[index] - self._ends[number]) + len(found)
        offsets, sizes = found.offsets[row].tolist(), found.sizes[row].tolist()
        members = [b""] * len(MEMBERS)
        for group in _neighbours(offsets, sizes):
            start = offsets[group[0]]
            length = max(offsets[i] + sizes[i] for i in group) - start
            data = read_range(self._shards[number], start, length, self._retry)
            for i in group:
                members[i] = data[offsets[i] - start : offsets[i] - start + sizes[i]]
        return make_record(found.key(row), subset, members)


def open_tars(
    patterns: str | Sequence[str],
    *,
    cache: Path | None = None,
    retry: RetryPolicy = RetryPolicy(),
    threads: int = 16,
    show: bool = True,
) -> TarSource:
    """Looks up shards, indexes those not in the cache, and gives access to their records.

    Args:
        patterns: as in :func:`~rflow_jax.data.storage.shards.expand`.
        cache: folder of the indexes; None: ``~/.cache/rflow_jax/genref``.
        threads: shards indexed at once.
        show: draw a progress bar.

    Raises:
        InputError: no shard matches, one cannot be read, or none holds a usable sample.
    """
    shards = expand(patterns, allow_shell=True, retry=retry)  # a pipe is refused below, and never run
    indexes = index_shards(shards, cache or cache_folder("genref"), retry=retry, threads=threads, show=show)
    return TarSource(shards, indexes, retry)


def _neighbours(offsets: list[int], sizes: list[int]) -> list[list[int]]:
    """Members by offset, in groups that are read at once."""
    groups: list[list[int]] = []
    end = 0
    for i in sorted(range(len(offsets)), key=offsets.__getitem__):
        if groups and offsets[i] - end <= _LARGEST_GAP:
            groups[-1].append(i)
        else:
            groups.append([i])
        end = max(end, offsets[i] + sizes[i])
    return groups
