"""Sampling of the mixture: each draw depends on the seed and the sample's number alone."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rflow_jax.data.records import SUBSETS
from rflow_jax.errors import InputError
from rflow_jax.utils.checks import suggestion

# Random streams of one seed that must not meet.
CHOICE, SHUFFLE, REPLACEMENT, SHARD_ORDER, BUFFER = range(5)
CHUNK = 4096


def random_words(seed: int, purpose: int, position: tuple[int, int], count: int) -> np.ndarray:
    """[count] uint64 random bits at one position of a stream; the same with every version of NumPy.

    Args:
        position: two numbers from 0; positions share no bits.
    """
    # The two low words of the counter count the output.
    return np.random.Philox(key=_key(seed, purpose), counter=[0, 0, *position]).random_raw(count)


@cache
def _key(seed: int, purpose: int) -> np.ndarray:
    return np.random.SeedSequence([seed, purpose]).generate_state(2, np.uint64)


class SubsetSchedule:
    """The subset of every sample, at ratios that change from stage to stage of the training.

    Args:
        ratios: for each subset one weight a stage; a subset that is left out is never drawn.
        stages: optimizer steps at which these weights hold; between two they are interpolated, outside they stay.
        seed: not negative.
        batch_size: samples of an optimizer step, over all processes.

    Raises:
        InputError: an unknown subset, or weights or stages that make no sense.
    """

    def __init__(self, ratios: Mapping[str, Sequence[float]], stages: Sequence[int], seed: int, batch_size: int):
        if not stages or any(b <= a for a, b in pairwise(stages)) or stages[0] < 0:
            raise InputError(f"training_stages {list(stages)}: must be increasing steps from 0, such as [0, 5000]")
        _check_ratios(ratios, len(stages))
        if seed < 0 or batch_size < 1:
            raise InputError(f"seed {seed} and batch_size {batch_size}: must be at least 0 and at least 1")
        self.seed, self.batch_size = seed, batch_size
        self._stages = np.asarray(stages, np.float64)
        rows = [ratios.get(name, [0.0] * len(stages)) for name in SUBSETS]
        self._ratios = np.asarray(rows, np.float64)
        self.wanted = tuple(name for name, row in zip(SUBSETS, rows, strict=True) if any(row))

    def ratios(self, step: int) -> dict[str, float]:
        """Probability of each subset at an optimizer step."""
        bounds = self._bounds(step, step + 1)[:, 0]
        return dict(zip(SUBSETS, np.diff(bounds, prepend=0.0).tolist(), strict=True))

    def subsets(self, start: int, stop: int) -> np.ndarray:
        """[stop - start] uint8: the index in ``SUBSETS`` of the samples with these numbers."""
        chunks = range(start // CHUNK, -(-stop // CHUNK))
        words = [random_words(self.seed, CHOICE, (chunk, 0), CHUNK) for chunk in chunks]
        if not words:
            return np.zeros(0, np.uint8)
        skipped = start // CHUNK * CHUNK
        word = np.concatenate(words)[start - skipped : stop - skipped]
        uniform = (word >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        bounds = self._bounds(start // self.batch_size, -(-stop // self.batch_size))
        steps = np.arange(start, stop) // self.batch_size - start // self.batch_size
        # The last bound is 1, and so are those before it whose subsets have no weight left: none of these is drawn.
        chosen = np.zeros(stop - start, np.uint8)
        for bound in bounds[:-1]:
            chosen += uniform >= bound[steps]
        return chosen

    def _bounds(self, start: int, stop: int) -> np.ndarray:
        """[subsets, stop - start]: cumulative probabilities at these steps."""
        steps = np.arange(start, stop)
        sums = np.cumsum([np.interp(steps, self._stages, row) for row in self._ratios], axis=0)
        return sums / sums[-1]


def _check_ratios(ratios: Mapping[str, Sequence[float]], stages: int) -> None:
    for name, row in ratios.items():
        if name not in SUBSETS:
            raise InputError(f"split_ratios: unknown subset {name}; {suggestion(name, SUBSETS)}")
        if len(row) != stages:
            raise InputError(f"split_ratios.{name}: {len(row)} ratios for {stages} training_stages; give one a stage")
        if any(not math.isfinite(ratio) or ratio < 0 for ratio in row):
            raise InputError(f"split_ratios.{name}: {list(row)} must be numbers of at least 0")
    for stage in range(stages):
        if not any(row[stage] for row in ratios.values()):
            raise InputError(f"split_ratios: all are 0 at stage {stage + 1} of training_stages; one must be positive")


_KEPT_SHUFFLES = 2 * len(SUBSETS)  # this epoch's and the one's before it, which replacements may still need


class SampleRef(NamedTuple):
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


class MixtureSampler:
    """Draws records. Each subset is shuffled anew for each of its epochs and goes round at its own pace.

    Args:
        counts: records of each subset.
        ratios, stages, seed, batch_size: as in :class:`~rflow_jax.data.sampling.SubsetSchedule`.
        position: where a run stood, from :meth:`position`; saves counting the draws before it again.

    Raises:
        InputError: as :class:`~rflow_jax.data.sampling.SubsetSchedule`, or a subset to draw from has no records.
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
        self.choice = SubsetSchedule(ratios, stages, seed, batch_size)
        self._counts = [int(counts.get(name, 0)) for name in SUBSETS]
        for name in self.choice.wanted:
            if not counts.get(name, 0):
                raise InputError(f"split_ratios.{name}: positive, but there are no records of it; set it to 0")
        # Draws of each subset before sample [0] + i * CHUNK of the training; grows as far as it is asked for.
        self._first, self._drawn = 0, [np.zeros(len(SUBSETS), np.int64)]
        if position is not None:
            try:
                self._first = int(position["number"])
                drawn = [int(position["drawn"][name]) for name in SUBSETS]
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"the checkpoint's data position is not one of a mixture: {position}") from error
            if min(drawn) < 0 or sum(drawn) != self._first:
                raise InputError(f"the checkpoint's data position does not add up: {position}")
            self._drawn = [np.asarray(drawn, np.int64)]
        self._shuffles: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def draws(self, step: int) -> list[SampleRef]:
        """The samples of an optimizer step, over all processes, in the order of their slots."""
        start = step * self.choice.batch_size
        return self.draws_of(range(start, start + self.choice.batch_size))

    def draws_of(self, numbers: range) -> list[SampleRef]:
        """The samples with these numbers, one after the other."""
        drawn = self._before(numbers.start).tolist()
        draws = []
        for number, subset in zip(numbers, self.choice.subsets(numbers.start, numbers.stop).tolist(), strict=True):
            epoch, slot = divmod(drawn[subset], self._counts[subset])
            draws.append(SampleRef(number, SUBSETS[subset], int(self._shuffle(subset, epoch)[slot]), epoch))
            drawn[subset] += 1
        return draws

    def position(self, step: int) -> dict[str, Any]:
        """The state of a run before a step, to be saved as JSON."""
        number = step * self.choice.batch_size
        return {"number": number, "drawn": dict(zip(SUBSETS, self._before(number).tolist(), strict=True))}

    def replacement(self, draw: SampleRef, attempt: int) -> SampleRef:
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
        slot = int(np.flatnonzero(shuffle == draw.index)[0]) + 1 + (word + attempt) % (count - 1)
        return draw._replace(index=int(shuffle[slot % count]))

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
