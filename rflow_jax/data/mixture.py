"""Which records are drawn: a function of the seed and the step, so that a run can begin at any step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rflow_jax.data.choice import CHUNK, REPLACEMENT, SHUFFLE, Choice, random_words
from rflow_jax.data.records import SUBSETS
from rflow_jax.errors import InputError

_KEPT_SHUFFLES = 2 * len(SUBSETS)  # the epoch at hand and the one before it, which replacements may still ask for


class Draw(NamedTuple):
    """One drawn sample.

    Attributes:
        number: of the sample in the whole training: step * batch_size + slot.
        index: of the record in its subset.
        epoch: how often the subset has been gone through before.
    """

    number: int
    subset: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    epoch: int


class Mixture:
    """Draws records. Each subset is shuffled anew for each of its epochs and goes round at its own pace.

    Args:
        counts: records of each subset.
        ratios, stages, seed, batch_size: as in :class:`~rflow_jax.data.choice.Choice`.
        position: where a run stood, from :meth:`position`; saves counting the draws before it again.

    Raises:
        InputError: as :class:`~rflow_jax.data.choice.Choice`, or a subset to draw from has no records.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        ratios: Mapping[str, Sequence[float]],
        stages: Sequence[int],
        seed: int,
        batch_size: int,
        position: Mapping[str, Any] | None = None,
    ):
        self.choice = Choice(ratios, stages, seed, batch_size)
        self._counts = [int(counts.get(name, 0)) for name in SUBSETS]
        for name in self.choice.wanted:
            if not counts.get(name, 0):
                raise InputError(f"split_ratios.{name}: positive, but there are no records of it; set it to 0")
        # Draws of each subset before sample [0] + i * CHUNK of the training; grows as far as it is asked for.
        self._first, self._drawn = 0, [np.zeros(len(SUBSETS), np.int64)]
        if position is not None:
            self._start_at(position)
        self._shuffles: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def draws(self, step: int) -> list[Draw]:
        """The samples of an optimizer step, over all processes, in the order of their slots."""
        start = step * self.choice.batch_size
        numbers = range(start, start + self.choice.batch_size)
        return self.draws_of(numbers)

    def draws_of(self, numbers: range) -> list[Draw]:
        """The samples with these numbers, one after the other."""
        drawn = self._before(numbers.start).tolist()
        draws = []
        for number, subset in zip(numbers, self.choice.subsets(numbers.start, numbers.stop).tolist(), strict=True):
            epoch, place = divmod(drawn[subset], self._counts[subset])
            draws.append(Draw(number, SUBSETS[subset], int(self._shuffle(subset, epoch)[place]), epoch))
            drawn[subset] += 1
        return draws

    def position(self, step: int) -> dict[str, Any]:
        """Where a run stands before a step, to be kept as JSON."""
        number = step * self.choice.batch_size
        return {"number": number, "drawn": dict(zip(SUBSETS, self._before(number).tolist(), strict=True))}

    def replacement(self, draw: Draw, attempt: int) -> Draw:
        """Another record of the same subset, for one that cannot be used.

        Args:
            attempt: 0, 1, ...; the first n - 1 attempts give every other of the n records once.

        Raises:
            InputError: there is no other.
        """
        subset = SUBSETS.index(draw.subset)
        count = self._counts[subset]
        if count < 2:
            raise InputError(f"{draw.subset}: its only record cannot be used; set split_ratios.{draw.subset} to 0")
        word = int(random_words(self.choice.seed, REPLACEMENT, (draw.number, 0), 1)[0])
        shuffle = self._shuffle(subset, draw.epoch)
        place = int(np.flatnonzero(shuffle == draw.index)[0]) + 1 + (word + attempt) % (count - 1)
        return draw._replace(index=int(shuffle[place % count]))

    def _before(self, number: int) -> np.ndarray:
        """[subsets] int64: how often each has been drawn before this sample."""
        if number < self._first:
            self._first, self._drawn = 0, [np.zeros(len(SUBSETS), np.int64)]
        chunks, rest = divmod(number - self._first, CHUNK)
        while len(self._drawn) <= chunks:
            start = self._first + (len(self._drawn) - 1) * CHUNK
            self._drawn.append(self._drawn[-1] + self._count(start, start + CHUNK))
        return self._drawn[chunks] + self._count(number - rest, number)

    def _count(self, start: int, stop: int) -> np.ndarray:
        return np.bincount(self.choice.subsets(start, stop), minlength=len(SUBSETS)).astype(np.int64)

    def _start_at(self, position: Mapping[str, Any]) -> None:
        try:
            number, drawn = int(position["number"]), [int(position["drawn"][name]) for name in SUBSETS]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint's data position is not one of a mixture: {position}") from error
        if min(drawn) < 0 or sum(drawn) != number:
            raise InputError(f"the checkpoint's data position does not add up: {position}")
        self._first, self._drawn = number, [np.asarray(drawn, np.int64)]

    def _shuffle(self, subset: int, epoch: int) -> np.ndarray:
        """[records] int32: the order of a subset in one of its epochs."""
        kept = self._shuffles.get((subset, epoch))
        if kept is None:
            words = random_words(self.choice.seed, SHUFFLE, (subset, epoch), self._counts[subset])
            kept = np.argsort(words, kind="stable").astype(np.int32)
            self._shuffles[subset, epoch] = kept
            if len(self._shuffles) > _KEPT_SHUFFLES:
                self._shuffles.popitem(last=False)
        else:
            self._shuffles.move_to_end((subset, epoch))
        return kept
