"""Who descends from whom, and who goes on: the decisions of a search, as pure functions.

A prompt's samples are a sequence in the order in which they were made; ``parent`` is a position in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rflow_jax.verifiers.base import Verdict

Seed = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sample:
    """One generated image of a prompt and where it came from.

    Attributes:
        round: counted over the whole search; the noise stage comes first.
        branch: position within the round.
        seed: (run's seed, index of the prompt, round, branch); the image's noise depends on nothing else.
        file: where the image lies, relative to the prompt's folder.
        parent: position of the corrected sample; None for an image from noise alone.
        reflection: the reflection that it was made with; empty if writing it failed.
        refined_prompt: the refined prompt that it was made with.
        text_errors: why a reflection or a refinement is missing.
        verdict: None only if the run has no verifier.
    """

    round: int
    branch: int
    seed: Seed
    file: str
    parent: int | None = None
    reflection: str | None = None
    refined_prompt: str | None = None
    text_errors: tuple[str, ...] = ()
    verdict: Verdict | None = None

    @property
    def rank(self) -> tuple[int, float]:
        """Greater is better; unscored is least."""
        return self.verdict.rank if self.verdict else (0, 0.0)


def best_first(samples: Sequence[Sample], among: Iterable[int]) -> list[int]:
    """The distinct positions in ``among``, best first; ties in the order the samples were made."""
    # Sorting is stable under reverse=True, so ties keep their order.
    return sorted(sorted(set(among)), key=lambda position: samples[position].rank, reverse=True)


def chains(samples: Sequence[Sample]) -> list[list[int]]:
    """Every chain from its noise image to its last correction, in the order in which the chains began."""
    heir = {sample.parent: position for position, sample in enumerate(samples) if sample.parent is not None}
    found = []
    for position, sample in enumerate(samples):
        if sample.parent is None and position in heir:
            chain = [position]
            while chain[-1] in heir:
                chain.append(heir[chain[-1]])
            found.append(chain)
    return found


def last_round(samples: Sequence[Sample]) -> list[int]:
    """The samples of the newest round, in branch order."""
    newest = max(sample.round for sample in samples)
    return [position for position, sample in enumerate(samples) if sample.round == newest]


def next_parents(samples: Sequence[Sample], count: int) -> list[int]:
    """The ``count`` best current samples, to be corrected next, in the order in which they were made.

    Current are all images of the noise stage, and later those of the last round. Keeping that order makes
    branch k of every round belong to chain k.
    """
    corrected = samples[-1].parent is not None
    current = last_round(samples) if corrected else range(len(samples))
    return sorted(best_first(samples, current)[:count])
