"""Which subset each sample is drawn from: a function of the seed and the sample's number, and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import pairwise

import numpy as np

from rflow_jax.data.records import SUBSETS
from rflow_jax.errors import InputError

# Random streams of one seed that must not meet.
CHOICE, SHUFFLE, REPLACEMENT, SHARD_ORDER, BUFFER = range(5)
CHUNK = 4096


def random_words(seed: int, purpose: int, place: tuple[int, int], count: int) -> np.ndarray:
    """[count] uint64 random bits of one place in a stream; the same with every version of NumPy.

    Args:
        place: two numbers from 0; places share no bits.
    """
    # The two low words of the counter count the output.
    return np.random.Philox(key=_key(seed, purpose), counter=[0, 0, *place]).random_raw(count)


@cache
def _key(seed: int, purpose: int) -> np.ndarray:
    return np.random.SeedSequence([seed, purpose]).generate_state(2, np.uint64)


class Choice:
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
        _check_stages(stages)
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
        """[stop - start] uint8: the place in ``SUBSETS`` of the samples with these numbers."""
        words = [self._words(chunk) for chunk in range(start // CHUNK, -(-stop // CHUNK))]
        if not words:
            return np.zeros(0, np.uint8)
        skipped = start // CHUNK * CHUNK
        word = np.concatenate(words)[start - skipped : stop - skipped]
        uniform = (word >> np.uint64(11)) * 2.0**-53  # in [0, 1)
        bounds = self._bounds(start // self.batch_size, -(-stop // self.batch_size))
        places = np.arange(start, stop) // self.batch_size - start // self.batch_size
        # The last bound is 1, and so are those before it whose subsets have no weight left: none of these is drawn.
        chosen = np.zeros(stop - start, np.uint8)
        for bound in bounds[:-1]:
            chosen += uniform >= bound[places]
        return chosen

    def _words(self, chunk: int) -> np.ndarray:
        return random_words(self.seed, CHOICE, (chunk, 0), CHUNK)

    def _bounds(self, start: int, stop: int) -> np.ndarray:
        """[subsets, stop - start]: cumulated probabilities at these steps."""
        steps = np.arange(start, stop)
        sums = np.cumsum([np.interp(steps, self._stages, row) for row in self._ratios], axis=0)
        return sums / sums[-1]


def _check_stages(stages: Sequence[int]) -> None:
    if not stages or any(b <= a for a, b in pairwise(stages)) or stages[0] < 0:
        raise InputError(f"training_stages {list(stages)}: must be increasing steps from 0, such as [0, 5000]")


def _check_ratios(ratios: Mapping[str, Sequence[float]], stages: int) -> None:
    for name, row in ratios.items():
        if name not in SUBSETS:
            near = get_close_matches(name, SUBSETS, 1)
            hint = f"did you mean {near[0]}?" if near else f"the known ones are {', '.join(SUBSETS)}"
            raise InputError(f"split_ratios: unknown subset {name}; {hint}")
        if len(row) != stages:
            raise InputError(f"split_ratios.{name}: {len(row)} ratios for {stages} training_stages; give one a stage")
        if any(not math.isfinite(ratio) or ratio < 0 for ratio in row):
            raise InputError(f"split_ratios.{name}: {list(row)} must be numbers of at least 0")
    for stage in range(stages):
        if not any(row[stage] for row in ratios.values()):
            raise InputError(f"split_ratios: all are 0 at stage {stage + 1} of training_stages; one must be positive")
