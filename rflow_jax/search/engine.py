"""The two searches: images from fresh noise, and corrections of the best of them.

Prompts are searched in groups, so that batches fill across prompts and memory stays bounded. While the next
batch is made, the images of the last one are scored.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.Image import Image

from rflow_jax.language.base import Case, Writer
from rflow_jax.search.chains import Sample, next_parents
from rflow_jax.search.config import SearchConfig
from rflow_jax.search.progress import Counters
from rflow_jax.search.store import PromptFolder
from rflow_jax.verifiers.base import Verdict, Verifier


@dataclass(frozen=True)
class Correction:
    """What turns a noise search into a reflection search: the two models that write."""

    reflector: Writer
    refiner: Writer


@dataclass
class _Prompt:
    index: int
    entry: Mapping[str, Any]
    folder: PromptFolder
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    prompt: _Prompt
    sample: Sample
    condition: Image | None = None


class Search:
    """One run over many prompts.

    Args:
        config: sizes of the stages and how an image is generated.
        pipe: the pipeline, with the corrector's LoRA if there are corrections.
        verifier: scores each image once; None leaves all images unscored.
        correction: who writes; None stops after the noise stage.
        out: folder of the run.
    """

    def __init__(
        self,
        config: SearchConfig,
        pipe: Any,
        verifier: Verifier | None,
        correction: Correction | None,
        out: Path,
    ) -> None:
        self.config = config
        self.pipe = pipe
        self.base = pipe.without_lora()
        self.verifier = verifier
        self.correction = correction
        self.out = out
        self._made_with = {
            "model": config.model,
            "lora": config.lora,
            "lora_alpha": config.lora_alpha,
            "dtype": config.dtype,
            "settings": asdict(pipe.resolve(config.settings)),
        }

    def run(self, entries: Mapping[int, Mapping[str, Any]]) -> Counters:
        """Searches all prompts, given by their index; returns what was counted."""
        images = len(entries) * self._images_per_prompt()
        self._counters = Counters(images, images if self.verifier else 0)
        self._scorers = ThreadPoolExecutor(self.verifier.concurrency if self.verifier else 1)
        try:
            with self._counters:
                for group in _groups(list(entries), self.config.prompts_in_flight):
                    self._search([self._open(index, entries[index]) for index in group])
        finally:
            self._close()
        return self._counters

    def _images_per_prompt(self) -> int:
        noise, reflect = self.config.noise, self.config.reflect
        corrections = reflect.search_rounds * reflect.search_branch if self.correction else 0
        return noise.search_rounds * noise.search_branch + corrections

    def _open(self, index: int, entry: Mapping[str, Any]) -> _Prompt:
        return _Prompt(index, entry, PromptFolder(self.out, index, entry))

    def _search(self, prompts: Sequence[_Prompt]) -> None:
        self._make(self.base, self._noise_jobs(prompts))
        if self.correction:
            first = self.config.noise.search_rounds
            for number in range(first, first + self.config.reflect.search_rounds):
                self._make(self.pipe, self._correction_jobs(prompts, number, self.correction))
        for prompt in prompts:
            prompt.folder.place_results(prompt.samples, verified=self.verifier is not None)

    def _noise_jobs(self, prompts: Sequence[_Prompt]) -> list[_Job]:
        noise = self.config.noise
        return [
            _Job(prompt, self._plan(prompt, number, branch))
            for prompt in prompts
            for number in range(noise.search_rounds)
            for branch in range(noise.search_branch)
        ]

    def _correction_jobs(self, prompts: Sequence[_Prompt], number: int, correction: Correction) -> list[_Job]:
        branches = self.config.reflect.search_branch
        picks = [
            (prompt, branch, parent)
            for prompt in prompts
            for branch, parent in enumerate(next_parents(prompt.samples, branches))
        ]
        cases = [_case(prompt, prompt.samples[parent]) for prompt, _, parent in picks]
        with ThreadPoolExecutor(1) as beside:
            refining = beside.submit(correction.refiner.write, cases)
            reflections = correction.reflector.write(cases)
            refinements = refining.result()
        jobs = []
        for (prompt, branch, parent), case, reflection, refined in zip(
            picks, cases, reflections, refinements, strict=True
        ):
            failures = {"reflection": reflection.error, "refined prompt": refined.error}
            errors = tuple(f"{what}: {error}" for what, error in failures.items() if error is not None)
            self._counters.failed_texts(errors)
            sample = replace(
                self._plan(prompt, number, branch),
                parent=parent,
                reflection=reflection.text or "",
                refined_prompt=refined.text or prompt.samples[parent].refined_prompt,
                text_errors=errors,
            )
            jobs.append(_Job(prompt, sample, case.image))
        return jobs

    def _plan(self, prompt: _Prompt, number: int, branch: int) -> Sample:
        seed = (self.config.seed, prompt.index, number, branch)
        return Sample(number, branch, seed, PromptFolder.image_name(number, seed))

    def _make(self, pipe: Any, jobs: Sequence[_Job]) -> None:
        """Generates, stores and scores one image a job; the samples are then part of their prompts."""
        waiting: deque[tuple[Sequence[_Job], Future[list[Verdict | None]]]] = deque()

        def on_images(first: int, images: list[Image]) -> None:
            batch = jobs[first : first + len(images)]
            for job, image in zip(batch, images, strict=True):
                job.prompt.folder.write_image(job.sample.file, image)
            self._counters.made(len(images))
            waiting.append((batch, self._scorers.submit(self._score, batch, images)))
            while waiting and waiting[0][1].done():
                self._keep(*waiting.popleft())

        conditions = [job.condition for job in jobs if job.condition is not None]
        pipe.generate(
            [job.prompt.entry["prompt"] for job in jobs],
            seeds=[job.sample.seed for job in jobs],
            conditions=conditions or None,
            reflections=[job.sample.reflection for job in jobs],
            refined_prompts=[job.sample.refined_prompt for job in jobs],
            settings=self.config.settings,
            on_images=on_images,
        )
        while waiting:
            self._keep(*waiting.popleft())

    def _keep(self, jobs: Sequence[_Job], verdicts: Future[list[Verdict | None]]) -> None:
        """Waits for the scores of a batch, and records its images; batches come in the order of their jobs."""
        for job, verdict in zip(jobs, verdicts.result(), strict=True):
            job.prompt.samples.append(replace(job.sample, verdict=verdict))
        for prompt in {id(job.prompt): job.prompt for job in jobs}.values():
            prompt.folder.write_records(prompt.samples, self._made_with)

    def _score(self, jobs: Sequence[_Job], images: Sequence[Image]) -> list[Verdict | None]:
        if self.verifier is None:
            return [None] * len(images)
        verdicts = self.verifier.score(images, [job.prompt.entry for job in jobs])
        reasons = [f"score: {verdict.error or 'not a number'}" for verdict in verdicts if not verdict.scored]
        self._counters.judged(len(verdicts) - len(reasons), reasons)
        return [*verdicts]

    def _close(self) -> None:
        """Ends what may still wait for an answer, so that an interrupted run ends at once."""
        self._scorers.shutdown(wait=False, cancel_futures=True)
        helpers = (self.correction.reflector, self.correction.refiner) if self.correction else ()
        for helper in (self.verifier, *helpers):
            if helper is not None:
                helper.close()


def _case(prompt: _Prompt, parent: Sample) -> Case:
    with PIL.Image.open(prompt.folder.path / parent.file) as file:
        image = file.convert("RGB")
    return Case(
        image=image,
        prompt=prompt.entry["prompt"],
        current_prompt=parent.refined_prompt or prompt.entry["prompt"],
        evaluation=(parent.verdict or Verdict(None)).evaluation(),
        last_reflection=parent.reflection or "",
    )


def _groups(items: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
