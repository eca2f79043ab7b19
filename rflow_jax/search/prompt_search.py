"""The search of one prompt as a state machine without threads: it takes results and returns the next tasks.

Whatever was done before, by this process or by one that was killed, is in the prompt's folder and is not repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from rflow_jax.errors import RunError
from rflow_jax.generation.pipeline import Request
from rflow_jax.generation.sampling import PerturbedSeed
from rflow_jax.search.lineage import Sample, ancestors, is_correction
from rflow_jax.search.prompt_folder import PromptFolder
from rflow_jax.search.strategies import PlannedImage, Strategy
from rflow_jax.utils.images import read_image
from rflow_jax.verifiers.base import Verdict, read_verdict
from rflow_jax.writers.base import PastImage, WriterInput, WriterOutput

# What an image still needs, in this order: a reflection on its parent, a refined prompt, to be made (or to be
# taken over, if it is given), to be judged.
Step = Literal["reflect", "refine", "draw", "take", "score"]
_TEXTS: dict[str, tuple[Step, ...]] = {"reflect": ("reflect", "refine"), "prompt": ("refine",)}
REFLECTION, REFINED, FAILURE, VERDICT = "reflection", "refined_prompt", "failure", "verdict"
_NOTED_AS: dict[Step, str] = {"reflect": REFLECTION, "refine": REFINED, "draw": FAILURE, "score": VERDICT}
_CALLED = {REFLECTION: "reflection", REFINED: "refined prompt"}


@dataclass(frozen=True)
class SearchTask:
    """One step of one image."""

    run: "PromptSearch"
    position: int
    step: Step

    @property
    def corrects(self) -> bool:
        """Whether the image is made with the corrector."""
        return is_correction(self.run.samples[self.position])


@dataclass(frozen=True)
class NotMade:
    """Why there is no image."""

    error: str


@dataclass(frozen=True)
class SearchContext:
    """The settings that all prompts of a run share.

    Attributes:
        seed: the run's.
        verified: whether images are judged.
        history: earlier images shown to the reflection generator.
        closeness: of noise in the neighbourhood of other noise.
        count_first: whether an image from before the first correction can be the best.
        made_with: for the records.
    """

    seed: int
    verified: bool
    history: int
    closeness: float
    count_first: bool
    made_with: Mapping[str, Any]


class PromptSearch:
    """The search of one prompt.

    Args:
        given: files of images to begin with, if the strategy does.
    """

    def __init__(
        self, folder: PromptFolder, strategy: Strategy, context: SearchContext, given: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self.strategy = strategy
        self.context = context
        self.given = given
        self.samples: list[Sample] = []
        self.finished = False
        self.drawn = 0  # images made by this process
        self._open = 0  # images of the round that are not judged yet
        self._parked = 0  # those of them that a service gave no answer about

    @property
    def index(self) -> int:
        """The prompt's index in the file."""
        return self.folder.index

    @property
    def prompt(self) -> str:
        return self.folder.entry["prompt"]

    @property
    def stalled(self) -> bool:
        """Whether nothing is left to do but what services gave no answer about; the next run asks again."""
        return 0 < self._open == self._parked

    def begin(self) -> list[SearchTask]:
        return self._next_round()

    def park(self) -> None:
        """Takes a task as unanswered: nothing is noted, and the round of its image does not end in this run."""
        self._parked += 1

    def done(self, task: SearchTask, result: WriterOutput | Verdict | NotMade | None) -> list[SearchTask]:
        """Takes a result, and returns the tasks that can follow.

        Args:
            result: a text, a verdict, why there is no image, or None for one that is now in the folder.

        Raises:
            RunError: the image is not there; repeating the task might never end.
        """
        if task.step == "draw":
            self.drawn += 1
        if result is not None:
            self.folder.journal.note(task.position, _NOTED_AS[task.step], asdict(result))
        follow = self._follow(task.position)
        if follow == task:
            raise RunError(f"{self.folder.path / self.place(task)}: disappeared after it was written; check the disk")
        if follow is not None:
            return [follow]
        self._open -= 1
        return [] if self._open else self._next_round()

    def _next_round(self) -> list[SearchTask]:
        """Plans rounds until one has open tasks; what an earlier process has done is kept."""
        while drafts := self.strategy.plan(self.samples):
            begin = len(self.samples)
            self.samples += [self._sample(draft) for draft in drafts]
            follow = (self._follow(position) for position in range(begin, len(self.samples)))
            todo = [task for task in follow if task is not None]
            self._open = len(todo)
            if todo:
                return todo
        context = self.context
        self.folder.finish(self.samples, context.made_with, context.verified, context.count_first)
        self.finished = True
        return []

    def _sample(self, draft: PlannedImage) -> Sample:
        seed = (self.context.seed, self.index, draft.round, draft.branch)
        path: tuple[Any, ...] = ()
        refined = None
        if draft.parent is not None:
            parent = self.samples[draft.parent]
            refined = parent.refined_prompt
            if draft.stage == "neighbour":
                path = (*(parent.noise_path or (parent.seed,)), seed)
        name = PromptFolder.image_name(draft.round, seed)
        return Sample(draft.round, draft.branch, draft.stage, seed, name, draft.parent, path, refined_prompt=refined)

    def _follow(self, position: int) -> SearchTask | None:
        """The next task of an image; None if it is complete."""
        sample, known = self.samples[position], self.folder.journal.known
        parent = None if sample.parent is None else self.samples[sample.parent]
        if sample.stage in _TEXTS and parent is not None and parent.error is not None:
            return self._give_up(position, f"{parent.file}, which it is made from, could not be made")
        for step in _TEXTS.get(sample.stage, ()):
            if parent is not None and known(position, _NOTED_AS[step]) is None:
                return SearchTask(self, position, step)
        if parent is not None and sample.stage in _TEXTS:
            texts, errors = {}, []
            for what in (_NOTED_AS[step] for step in _TEXTS[sample.stage]):
                written = WriterOutput(**known(position, what))
                if written.error is not None:
                    errors.append(f"{_CALLED[what]}: {written.error}")
                texts[what] = written.text
            self.samples[position] = sample = replace(
                sample,
                reflection=(texts[REFLECTION] or "") if REFLECTION in texts else None,
                refined_prompt=texts[REFINED] or parent.refined_prompt,
                text_errors=tuple(errors),
            )
        if failure := known(position, FAILURE):
            return self._give_up(position, NotMade(**failure).error)
        if not self.folder.has_image(sample.file):
            return SearchTask(self, position, "take" if sample.stage == "given" else "draw")
        if self.context.verified:
            verdict = known(position, VERDICT)
            if verdict is None:
                return SearchTask(self, position, "score")
            self.samples[position] = replace(sample, verdict=read_verdict(verdict))
        return None

    def _give_up(self, position: int, error: str) -> None:
        """An image without a file, and without a score."""
        verdict = Verdict(None, error=error) if self.context.verified else None
        self.samples[position] = replace(self.samples[position], error=error, verdict=verdict)

    def case(self, task: SearchTask) -> WriterInput:
        """The input of a language model: an image's parent and its history, read from the folder."""
        parent = self.samples[task.position].parent
        assert parent is not None
        sample, reflection = self.samples[parent], ""
        if task.step == "refine" and task.corrects:
            reflection = WriterOutput(**self.folder.journal.known(task.position, REFLECTION)).text or ""
        earlier = ancestors(self.samples, parent)
        shown = earlier[max(0, len(earlier) - self.context.history) :] if task.step == "reflect" else []
        past = [self.samples[position] for position in shown]
        return WriterInput(
            image=self.folder.read_image(sample.file),
            prompt=self.prompt,
            current_prompt=sample.refined_prompt or self.prompt,
            evaluation=_evaluation(sample),
            last_reflection=sample.reflection or "",
            reflection=reflection,
            history=tuple(
                PastImage(self.folder.read_image(one.file), one.reflection or "", _evaluation(one)) for one in past
            ),
        )

    def request(self, task: SearchTask) -> Request:
        """The generator's request for the image."""
        sample = self.samples[task.position]
        condition = None
        if task.corrects:
            assert sample.parent is not None
            condition = self.folder.read_image(self.samples[sample.parent].file)
        seed = PerturbedSeed(sample.noise_path, self.context.closeness) if sample.noise_path else sample.seed
        return Request(self.prompt, seed, condition, sample.reflection, sample.refined_prompt)

    def given_image(self, task: SearchTask) -> Image:
        """The given image that the task takes over."""
        return read_image(self.given[self.samples[task.position].branch])

    def place(self, task: SearchTask) -> str:
        """The image's file, relative to the prompt's folder."""
        return self.samples[task.position].file


def _evaluation(sample: Sample) -> str:
    return (sample.verdict or Verdict(None)).evaluation()
