"""Search strategies: which images come next, given the existing ones and their verdicts.

A strategy is a sequence of stages, and knows nothing of models, files or threads. The engine asks it for the next
images of a prompt once all earlier ones are judged.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rflow_jax.search.lineage import Sample, StageName, best_first, last_round, next_parents


@dataclass(frozen=True)
class PlannedImage:
    """An image to be made.

    Attributes:
        parent: position of the sample that it is made from.
    """

    round: int
    branch: int
    stage: StageName
    parent: int | None = None


@dataclass(frozen=True)
class Stage(ABC):
    """Consecutive rounds of one kind.

    Attributes:
        rounds: how many there are.
        branches: images in each.
    """

    rounds: int
    branches: int

    independent: ClassVar[bool] = False
    """Whether a round can be planned before the previous one is judged."""

    @abstractmethod
    def drafts(self, samples: Sequence[Sample], number: int, first: bool) -> list[PlannedImage]:
        """The images of a round.

        Args:
            number: the round, counted over the whole search.
            first: whether it is the first of the stage.
        """


class GivenImages(Stage):
    """One round of existing images, made by another run."""

    def drafts(self, samples: Sequence[Sample], number: int, first: bool) -> list[PlannedImage]:
        return [PlannedImage(number, branch, "given") for branch in range(self.branches)]


class FreshNoise(Stage):
    """Images of the prompt from fresh noise."""

    independent = True

    def drafts(self, samples: Sequence[Sample], number: int, first: bool) -> list[PlannedImage]:
        return [PlannedImage(number, branch, "noise") for branch in range(self.branches)]


class ZeroOrder(Stage):
    """Fresh images first, then neighbours of the best noise so far: it moves whenever a neighbour is better."""

    def drafts(self, samples: Sequence[Sample], number: int, first: bool) -> list[PlannedImage]:
        if first:
            return [PlannedImage(number, branch, "noise") for branch in range(self.branches)]
        pivot = best_first(samples, range(len(samples)))[0]
        return [PlannedImage(number, branch, "neighbour", pivot) for branch in range(self.branches)]


class RefinedPrompts(Stage):
    """Each branch goes on by itself: an image, a better prompt from it, an image of that, ..."""

    def drafts(self, samples: Sequence[Sample], number: int, first: bool) -> list[PlannedImage]:
        parents: Sequence[int | None] = [None] * self.branches if first else last_round(samples)
        return [PlannedImage(number, branch, "prompt", parent) for branch, parent in enumerate(parents)]


class Corrections(Stage):
    """The best current images, each corrected once a round."""

    def drafts(self, samples: Sequence[Sample], number: int, first: bool) -> list[PlannedImage]:
        parents = next_parents(samples, self.branches)
        return [PlannedImage(number, branch, "reflect", parent) for branch, parent in enumerate(parents)]


@dataclass(frozen=True)
class Strategy:
    """A sequence of stages, and when to stop.

    Attributes:
        stop_score: the prompt is done once an image reaches this score (and is not judged "no").
        max_images: images made for the prompt at most; given ones do not count.
    """

    stages: tuple[Stage, ...]
    stop_score: float | None = None
    max_images: int | None = None

    def plan(self, samples: Sequence[Sample]) -> tuple[PlannedImage, ...]:
        """The images to make next; empty when the search is done.

        Args:
            samples: everything planned so far, judged.
        """
        if self.reached(samples):
            return ()
        number = samples[-1].round + 1 if samples else 0
        drafts: list[PlannedImage] = []
        begin = 0
        for stage in self.stages:
            while begin <= number < begin + stage.rounds:
                if drafts and not (stage.independent and self.stop_score is None):
                    return self._within_budget(samples, drafts)
                drafts += stage.drafts(samples, number, number == begin)
                number += 1
            begin += stage.rounds
        return self._within_budget(samples, drafts)

    def reached(self, samples: Sequence[Sample]) -> bool:
        """Whether an image is good enough."""
        if self.stop_score is None:
            return False
        verdicts = [sample.verdict for sample in samples if sample.verdict and sample.verdict.scored]
        return any(v.label != "no" and v.score is not None and v.score >= self.stop_score for v in verdicts)

    def images(self) -> int:
        """Images made for a prompt at most."""
        planned = sum(stage.rounds * stage.branches for stage in self.stages if not isinstance(stage, GivenImages))
        return planned if self.max_images is None else min(planned, self.max_images)

    def _within_budget(self, samples: Sequence[Sample], drafts: Sequence[PlannedImage]) -> tuple[PlannedImage, ...]:
        if self.max_images is None:
            return tuple(drafts)
        left = self.max_images - sum(sample.stage != "given" for sample in samples)
        given = [draft for draft in drafts if draft.stage == "given"]
        return (*given, *[draft for draft in drafts if draft.stage != "given"][: max(0, left)])
