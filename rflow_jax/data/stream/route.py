"""Which records one process reads from a stream of shards, and in which order.

Processes share the shards of an epoch, each reading its own part; parts move on from epoch to epoch. Where there are
fewer shards than processes, all read all shards and each keeps every n-th record of n processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rflow_jax.data.choice import SHARD_ORDER, random_words
from rflow_jax.data.records import SUBSETS
from rflow_jax.data.storage.patience import Patience
from rflow_jax.data.storage.shards import Shard
from rflow_jax.data.stream.shards import Raw, read_shard
from rflow_jax.errors import InputError


class Place(NamedTuple):
    """Where a record lies in the stream of one process.

    Attributes:
        epoch: how often the shards have been gone through before.
        shard: its number in this epoch's order.
        sample: its number in the shard.
    """

    epoch: int
    shard: int
    sample: int


class Item(NamedTuple):
    """A record in a buffer."""

    place: Place
    raw: Raw


@dataclass(frozen=True)
class Share:
    """The part of the samples and of the stream that is one process's.

    Attributes:
        own: of ``parts`` parts.
    """

    slots: tuple[int, ...]
    own: frozenset[int]
    parts: int

    @classmethod
    def of(cls, slots: Sequence[int], batch_size: int) -> Share:
        """From the slots alone, so that processes with the same slots read the same."""
        size, first = len(slots), slots[0]
        if list(slots) == list(range(first, first + size)) and batch_size % size == 0 and first % size == 0:
            return cls(tuple(slots), frozenset([first // size]), batch_size // size)
        return cls(tuple(slots), frozenset(slots), batch_size)

    @property
    def name(self) -> str:
        """Of this process's part of a position."""
        return ",".join(map(str, self.slots))


class Route:
    """Which records of which shards one process reads, epoch by epoch."""

    def __init__(self, shards: Sequence[Shard], share: Share, seed: int):
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

    def takes(self, place: Place, number: int) -> bool:
        """Whether a record is read, that has this number in its subset and shard."""
        return self._dealt or self._is_own(number + place.epoch)

    def _is_own(self, number: int) -> bool:
        return number % self._share.parts in self._share.own


class Stream:
    """The records of one process, one after the other and for ever, from any place on."""

    def __init__(self, route: Route, patience: Patience, place: Place = Place(0, 0, 0)):
        self._route, self._patience = route, patience
        self.place = place  # of the next sample
        self._open: Iterator[tuple[Place, Raw]] | None = None
        self._shards = route.shards(place.epoch)

    def read(self) -> tuple[Place, Raw] | None:
        """The next sample with its place; None at the end of a shard."""
        if self._open is None:
            self._open = self._read(self.place)
        found = next(self._open, None)
        if found is not None:
            self.place = found[0]._replace(sample=found[0].sample + 1)
            return found
        self._open = None
        epoch, shard, _ = self.place
        self.place = Place(epoch, shard + 1, 0)
        if self.place.shard >= len(self._shards):
            self.place = Place(epoch + 1, 0, 0)
            self._shards = self._route.shards(epoch + 1)
        return None

    def items(self, places: Sequence[Place]) -> dict[Place, Item]:
        """The records at these places, read again.

        Raises:
            InputError: one is not there any more.
        """
        found: dict[Place, Item] = {}
        for epoch, shard in sorted({place[:2] for place in places}):
            wanted = {place for place in places if place[:2] == (epoch, shard)}
            begin = Place(epoch, shard, 0)
            for place, raw in Stream(self._route, self._patience, begin)._read(begin):
                if place in wanted and not raw.trouble:
                    found[place] = Item(place, raw)
                if place.sample >= max(wanted).sample:
                    break
        if missing := set(places) - found.keys():
            shard = self._route.shards(min(missing).epoch)[min(missing).shard]
            raise InputError(
                f"{shard.shown}: sample {min(missing).sample} is not there any more, so it cannot be resumed"
            )
        return found

    def _read(self, begin: Place) -> Iterator[tuple[Place, Raw]]:
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
