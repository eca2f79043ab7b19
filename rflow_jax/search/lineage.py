"""Descent and selection of samples: the decisions of a search, as pure functions.

A prompt's samples are a sequence in the order in which they were planned; ``parent`` is a position in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rflow_jax.verifiers import ranking
from rflow_jax.verifiers.base import Verdict

Seed = tuple[int, int, int, int]
# given: from another folder. noise: the prompt alone. prompt: a refined prompt. neighbour: noise near another's.
# reflect: a correction of its parent.
StageName = Literal["given", "noise", "prompt", "neighbour", "reflect"]


@dataclass(frozen=True)
class Sample:
    """One generated image of a prompt and where it came from.

    Attributes:
        round: counted over the whole search; the first stage comes first.
        branch: position within the round.
        stage: what kind of image it is.
        seed: (run's seed, index of the prompt, round, branch).
        file: where the image lies, relative to the prompt's folder.
        parent: position of the sample that it was made from; None for an image from noise alone.
        noise_path: the seeds that its noise came from, the pivots' first; empty if it is ``seed`` alone.
        reflection: the reflection that it was made with; empty if writing it failed.
        refined_prompt: the refined prompt that it was made with.
        text_errors: why a reflection or a refinement is missing.
        verdict: None only if the run has no verifier.
        error: why there is no image; it is then unscored, and has no file.
    """

    round: int
    branch: int
    stage: StageName
    seed: Seed
    file: str
    parent: int | None = None
    noise_path: tuple[Seed, ...] = ()
    reflection: str | None = None
    refined_prompt: str | None = None
    text_errors: tuple[str, ...] = ()
    verdict: Verdict | None = None
    error: str | None = None


def best_first(samples: Sequence[Sample], among: Iterable[int]) -> list[int]:
    """The distinct positions in ``among``, best first of these; ties in the order the samples were made."""
    compared = sorted(set(among))
    return [compared[k] for k in ranking.best_first([samples[position].verdict for position in compared])]


def made(samples: Sequence[Sample], among: Iterable[int]) -> list[int]:
    """Those positions in ``among`` that have an image."""
    return [position for position in among if samples[position].error is None]


def is_correction(sample: Sample) -> bool:
    """Whether it was made by correcting its parent."""
    return sample.stage == "reflect"


def chains(samples: Sequence[Sample]) -> list[list[int]]:
    """Every chain from its first image to its last correction, in the order of the first corrections.

    Two chains may begin with the same image, if there were too few images to give each chain one of its own.
    """
    heirs = {sample.parent: position for position, sample in enumerate(samples) if is_correction(sample)}
    found = []
    for position, sample in enumerate(samples):
        if is_correction(sample) and sample.parent is not None and not is_correction(samples[sample.parent]):
            chain = [sample.parent, position]
            while chain[-1] in heirs:
                chain.append(heirs[chain[-1]])
            found.append(chain)
    return found


def last_round(samples: Sequence[Sample]) -> list[int]:
    """The samples of the newest round, in branch order."""
    newest = max(sample.round for sample in samples)
    return [position for position, sample in enumerate(samples) if sample.round == newest]


def next_parents(samples: Sequence[Sample], count: int) -> list[int]:
    """The ``count`` best current samples, to be corrected next, in the order in which they were made.

    Current are all images before the first correction, and later those of the last round. Keeping that order makes
    branch k of every round belong to chain k. Where there are fewer than ``count``, the best are taken again.
    """
    every = range(len(samples))
    # Among the last round also one that could not be made: its chain ends with it.
    current = last_round(samples) if is_correction(samples[-1]) else made(samples, every) or every
    best = best_first(samples, current)
    return sorted((best * count)[:count])


def best_of_chains(samples: Sequence[Sample], count_first: bool = True) -> list[int]:
    """The best sample of each chain; the chain's first image counts unless ``count_first`` is false."""
    return [best_first(samples, chain if count_first else chain[1:])[0] for chain in chains(samples)]


def best_of_all(samples: Sequence[Sample], count_first: bool = True) -> int:
    """The best sample; with ``count_first`` false the best correction, if there is any."""
    corrections = [position for position, sample in enumerate(samples) if is_correction(sample)]
    return best_first(samples, corrections if corrections and not count_first else range(len(samples)))[0]


def ancestors(samples: Sequence[Sample], position: int) -> list[int]:
    """The samples that it was corrected from, the oldest first."""
    found: list[int] = []
    while is_correction(samples[position]):
        parent = samples[position].parent
        assert parent is not None
        found.append(parent)
        position = parent
    return found[::-1]
