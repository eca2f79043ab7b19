"""The search of one prompt as a machine without threads: it is told what was done, and says what can be done next.

Whatever was done before, by this process or by one that was killed, stands in the prompt's folder and is not asked for
again.
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
REFLECTION, REFINED, VERDICT = "reflection", "refined_prompt", "verdict"
_NOTED_AS: dict[Step, str] = {"reflect": REFLECTION, "refine": REFINED, "score": VERDICT}
_CALLED = {REFLECTION: "reflection", REFINED: "refined prompt"}


@dataclass(frozen=True)
class SearchTask:
    """One thing to do for one image."""

    run: "PromptSearch"
    position: int
    step: Step

    @property
    def corrects(self) -> bool:
        """Whether the image is made with the corrector."""
        return is_correction(self.run.samples[self.position])


@dataclass(frozen=True)
class SearchContext:
    """What is the same for all prompts of a run.

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
    """One prompt on its way.

    Args:
        given: files of images to begin with, if the strategy does.
    """

    def __init__(
        self,
        folder: PromptFolder,
        strategy: Strategy,
        terms: SearchContext,
        given: Sequence[Path] = (),
    ) -> None:
        self.folder = folder
        self.strategy = strategy
        self.terms = terms
        self.given = given
        self.samples: list[Sample] = []
        self.finished = False
        self.drawn = 0  # images made by this process
        self._open = 0  # images of the round that are not judged yet

    @property
    def index(self) -> int:
        """The prompt's place in the file."""
        return self.folder.index

    @property
    def prompt(self) -> str:
        """The prompt."""
        return self.folder.entry["prompt"]

    def begin(self) -> list[SearchTask]:
        """The first things to do."""
        return self._next_round()

    def done(self, work: SearchTask, result: WriterOutput | Verdict | None) -> list[SearchTask]:
        """Takes a result, and says what can be done now.

        Args:
            result: a text, a verdict, or None for an image that lies in the folder now.

        Raises:
            RunError: the image does not lie there; asking for it again might go on for ever.
        """
        if work.step == "draw":
            self.drawn += 1
        if result is not None:
            self.folder.journal.note(work.position, _NOTED_AS[work.step], asdict(result))
        follow = self._follow(work.position)
        if follow == work:
            raise RunError(f"{self.folder.path / self.place(work)}: was written and is not there; look after the disk")
        if follow is not None:
            return [follow]
        self._open -= 1
        return [] if self._open else self._next_round()

    def _next_round(self) -> list[SearchTask]:
        """Plans rounds until there is something to do; what an earlier process did of them is taken over."""
        while drafts := self.strategy.plan(self.samples):
            begin = len(self.samples)
            self.samples += [self._sample(draft) for draft in drafts]
            works = [self._follow(position) for position in range(begin, len(self.samples))]
            todo = [work for work in works if work is not None]
            self._open = len(todo)
            if todo:
                return todo
        terms = self.terms
        self.folder.finish(self.samples, terms.made_with, terms.verified, terms.count_first)
        self.finished = True
        return []

    def _sample(self, draft: PlannedImage) -> Sample:
        seed = (self.terms.seed, self.index, draft.round, draft.branch)
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
        """What an image needs next; None: nothing more."""
        sample, known = self.samples[position], self.folder.journal.known
        for step in _TEXTS.get(sample.stage, ()):
            if sample.parent is not None and known(position, _NOTED_AS[step]) is None:
                return SearchTask(self, position, step)
        if sample.parent is not None and sample.stage in _TEXTS:
            self.samples[position] = sample = self._with_texts(position)
        if not self.folder.has_image(sample.file):
            return SearchTask(self, position, "take" if sample.stage == "given" else "draw")
        if self.terms.verified:
            verdict = known(position, VERDICT)
            if verdict is None:
                return SearchTask(self, position, "score")
            self.samples[position] = replace(sample, verdict=read_verdict(verdict))
        return None

    def _with_texts(self, position: int) -> Sample:
        sample = self.samples[position]
        texts, errors = {}, []
        for what in (_NOTED_AS[step] for step in _TEXTS[sample.stage]):
            written = WriterOutput(**self.folder.journal.known(position, what))
            if written.error is not None:
                errors.append(f"{_CALLED[what]}: {written.error}")
            texts[what] = written.text
        assert sample.parent is not None
        return replace(
            sample,
            reflection=(texts[REFLECTION] or "") if REFLECTION in texts else None,
            refined_prompt=texts[REFINED] or self.samples[sample.parent].refined_prompt,
            text_errors=tuple(errors),
        )

    def case(self, work: SearchTask) -> WriterInput:
        """What a language model is told about an image's parent; the images are read from the folder."""
        parent = self.samples[work.position].parent
        assert parent is not None
        sample, reflection = self.samples[parent], ""
        if work.step == "refine" and work.corrects:
            reflection = WriterOutput(**self.folder.journal.known(work.position, REFLECTION)).text or ""
        earlier = ancestors(self.samples, parent)
        shown = earlier[max(0, len(earlier) - self.terms.history) :] if work.step == "reflect" else []
        return WriterInput(
            image=self.folder.read_image(sample.file),
            prompt=self.prompt,
            current_prompt=sample.refined_prompt or self.prompt,
            evaluation=_evaluation(sample),
            last_reflection=sample.reflection or "",
            reflection=reflection,
            history=tuple(self._past(position) for position in shown),
        )

    def _past(self, position: int) -> PastImage:
        sample = self.samples[position]
        return PastImage(self.folder.read_image(sample.file), sample.reflection or "", _evaluation(sample))

    def request(self, work: SearchTask) -> Request:
        """What the image is made from."""
        sample = self.samples[work.position]
        condition = None
        if work.corrects:
            assert sample.parent is not None
            condition = self.folder.read_image(self.samples[sample.parent].file)
        seed = PerturbedSeed(sample.noise_path, self.terms.closeness) if sample.noise_path else sample.seed
        return Request(self.prompt, seed, condition, sample.reflection, sample.refined_prompt)

    def given_image(self, work: SearchTask) -> Image:
        """The image to begin with."""
        return read_image(self.given[self.samples[work.position].branch])

    def place(self, work: SearchTask) -> str:
        """Where the image goes, in the prompt's folder."""
        return self.samples[work.position].file


def _evaluation(sample: Sample) -> str:
    return (sample.verdict or Verdict(None)).evaluation()
