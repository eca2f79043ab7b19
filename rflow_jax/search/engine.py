"""The engine of every search: many prompts at once, so that the generator is never idle.

The main thread feeds the generator: it takes images of any prompt and round that are ready to be made, a batch at a
time, and sends the next batch on its way before it waits for the last one. Pools of threads ask the verifier and the
language models meanwhile. Which images a prompt needs follows from its own verdicts alone (:mod:`.prompt_search`), so
nothing here, neither timing nor the order of answers, changes a result.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image

from rflow_jax.errors import serving
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import Pending, Request
from rflow_jax.search.progress import BusyClock, SearchProgress
from rflow_jax.search.prompt_search import NotMade, PromptSearch, SearchTask, Step
from rflow_jax.utils.worker_pool import BatchingPool, wait_for
from rflow_jax.verifiers.base import Verdict, Verifier, score_images
from rflow_jax.writers.base import TextGenerator, WriterOutput

SAVERS = 2  # threads that read, encode and write images
UNSAVED = 64  # images in memory that wait to be written, and one batch; then the generator waits for the disk
ROLES: dict[Step, str] = {"score": "verifier", "reflect": "reflector", "refine": "refiner"}
PATIENCE = 0.5  # seconds between checks for changes that no thread announces


@runtime_checkable
class Generator(Protocol):
    """What a search needs of a :class:`~rflow_jax.generation.pipeline.Pipeline`."""

    def without_lora(self) -> Generator: ...

    def images_at_once(self, settings: SamplingConfig) -> int: ...

    def resolve(self, settings: SamplingConfig) -> SamplingConfig: ...

    def start(self, requests: Sequence[Request], settings: SamplingConfig) -> Pending: ...


@dataclass(frozen=True)
class Models:
    """The models of a search; None for roles that it does not need."""

    verifier: Verifier | None = None
    reflector: TextGenerator | None = None
    refiner: TextGenerator | None = None

    def close(self) -> None:
        """Cancels pending calls."""
        for model in (self.verifier, self.reflector, self.refiner):
            if model is not None:
                model.close()


class Engine:
    """Runs the searches of many prompts.

    Args:
        pipe: the pipeline, with the corrector's LoRA if there are corrections.
        in_flight: prompts searched together.
        live: receives progress events.
        should_stop: called before each further call; a reason ends the run once the calls in flight are done.
        on_tick: called between batches.
    """

    def __init__(
        self,
        pipe: Generator,
        models: Models,
        settings: SamplingConfig,
        in_flight: int,
        live: SearchProgress,
        clock: BusyClock,
        should_stop: Callable[[], str | None] = lambda: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._pipes = {True: pipe, False: pipe.without_lora()}
        self._models = models
        self._settings = settings
        self._in_flight = in_flight
        self._live = live
        self._clock = clock
        self._should_stop = should_stop
        self._on_tick = on_tick
        self._changed = threading.Condition()
        self._ready: dict[bool, deque[SearchTask]] = {True: deque(), False: deque()}
        self._compiled: set[bool] = set()
        self._calls: dict[Step, BatchingPool] = {}
        self._saving = 0
        self._active = 0
        self._failure: BaseException | None = None
        self.stopped: str | None = None

    def run(self, prompts: Iterator[PromptSearch]) -> None:
        """Searches all prompts, opened one by one; if the run ends early, ``stopped`` says why."""
        self._prompts = prompts
        models = self._models
        for step, role in ROLES.items():
            if (model := getattr(models, role)) is not None:
                call, limits = partial(_ask, role, model), (model.concurrency, model.batch_size)
                self._calls[step] = BatchingPool(step, call, *limits, self._done, self._fail)
        self._savers = ThreadPoolExecutor(SAVERS, "saver")
        try:
            with self._changed:
                self._open_prompts()
            self._generate()
        finally:
            for calls in self._calls.values():
                calls.close()
            self._savers.shutdown(cancel_futures=True)  # waits for images that are half written
            self._models.close()
            wait_for(*self._calls.values())

    def _generate(self) -> None:
        """Feeds the generator until nothing is left to do."""
        sent: tuple[list[SearchTask], Pending] | None = None
        while True:
            # While the device is busy, a batch that is not full waits for more.
            batch = self._take(full=sent is not None)
            if not batch and sent is None:
                if not self._wait():
                    return
                continue
            started = None
            if batch:
                corrects = batch[0].corrects
                requests = [task.run.request(task) for task in batch]
                self._clock.sent(compiles=corrects not in self._compiled)
                self._compiled.add(corrects)
                started = batch, self._pipes[corrects].start(requests, self._settings)
            if sent is not None:
                tasks, pending = sent
                images = pending.images()
                self._clock.arrived()
                self._live.made(sum(not isinstance(image, str) for image in images))
                for task, image in zip(tasks, images, strict=True):
                    if isinstance(image, str):
                        self._done(task, NotMade(image))
                    else:
                        self._submit_image(task, image)
            sent = started
            self._on_tick()

    def _take(self, full: bool) -> list[SearchTask]:
        """Images of one kind that are ready to be made, the fullest batch first; none while there are too few."""
        size = self._pipes[True].images_at_once(self._settings)
        with self._changed:
            self._raise()
            waiting = max(self._ready.values(), key=lambda tasks: min(len(tasks), size))
            if self.stopped or not waiting or (full and len(waiting) < size):
                return []
            return [waiting.popleft() for _ in range(min(size, len(waiting)))]

    def _submit_image(self, task: SearchTask, image: Image | None) -> None:
        with self._changed:
            while image is not None and self._saving >= UNSAVED:
                self._raise()
                self._changed.wait(PATIENCE)
            self._saving += 1
        self._savers.submit(self._save, task, image)

    def _save(self, task: SearchTask, image: Image | None) -> None:
        """Stores an image that was made, or one that is given."""
        try:
            image = task.run.given_image(task) if image is None else image
            task.run.folder.write_image(task.run.place(task), image)
            self._done(task, None)
        except BaseException as error:
            self._fail(error)
        finally:
            with self._changed:
                self._saving -= 1
                self._changed.notify_all()

    def _done(self, task: SearchTask, result: Any) -> None:
        if isinstance(result, Verdict | WriterOutput) and result.missing:
            self._live.unanswered(ROLES[task.step], result.error or "no answer")
            with self._changed:
                task.run.park()
                self._go_on(task.run)
            return
        if isinstance(result, Verdict):
            self._live.judged(None if result.scored else self._said(task, result.error or "not a number"))
            if result.scored and result.error:
                self._live.member_failed(result.error)
        elif isinstance(result, NotMade):
            self._live.not_made(result.error)
        elif isinstance(result, WriterOutput) and result.error is not None:
            what = "reflection" if task.step == "reflect" else "refined prompt"
            self._live.text_failed(what, self._said(task, result.error))
        with self._changed:
            self._dispatch(task.run.done(task, result))
            self._go_on(task.run)

    def _said(self, task: SearchTask, error: str) -> str:
        """An error with the role and the service that it comes from, if it comes from one."""
        role = ROLES[task.step]
        service = getattr(getattr(self._models, role), "service", None)
        return f"{role} {service}: {error}" if service else error

    def _go_on(self, run: PromptSearch) -> None:
        """What follows any result: perhaps no more calls, and another prompt in place of one that is over."""
        if any(calls.waiting for calls in self._calls.values()):
            self._may_ask()
        if run.finished or run.stalled:
            self._close_prompt(run)
            self._open_prompts()
        self._changed.notify_all()

    def _dispatch(self, tasks: Sequence[SearchTask]) -> None:
        for task in tasks:
            if task.step == "draw":
                self._ready[task.corrects].append(task)
            elif task.step == "take":
                self._submit_image(task, None)
            elif self._may_ask():
                self._calls[task.step].submit(task)

    def _may_ask(self) -> bool:
        """Whether further calls may be made; if not, pending ones are cancelled."""
        if not self.stopped:
            self.stopped = self._should_stop()
            if self.stopped:
                for calls in self._calls.values():
                    calls.cancel_pending()
        return not self.stopped

    def _open_prompts(self) -> None:
        """Begins further prompts while there is room; those that need nothing more are closed at once."""
        while self._active < self._in_flight and not self.stopped:
            run = next(self._prompts, None)
            if run is None:
                return
            self._active += 1
            self._dispatch(run.begin())
            if run.finished:
                self._close_prompt(run)

    def _close_prompt(self, run: PromptSearch) -> None:
        self._active -= 1
        self._live.spared(run.strategy.images() - run.drawn)
        self._live.unmade(sum(sample.error is not None for sample in run.samples))

    def _wait(self) -> bool:
        """Waits until there is something to generate; false when there will be nothing more."""
        with self._changed:
            while True:
                self._raise()
                busy = self._saving or any(calls.asked for calls in self._calls.values())
                if not self._active or (self.stopped and not busy):
                    return False
                if not self.stopped and any(self._ready.values()):
                    return True
                self._changed.wait(PATIENCE)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure


def _ask(role: str, model: Any, tasks: Sequence[SearchTask]) -> Sequence[Verdict | WriterOutput]:
    with serving(role):
        return _score(model, tasks) if role == "verifier" else _write(model, tasks)


def _score(verifier: Verifier, tasks: Sequence[SearchTask]) -> list[Verdict]:
    images = [task.run.folder.read_image(task.run.place(task)) for task in tasks]
    return score_images(verifier, images, [task.run.folder.entry for task in tasks])


def _write(writer: TextGenerator, tasks: Sequence[SearchTask]) -> list[WriterOutput]:
    return writer.write([task.run.case(task) for task in tasks])
