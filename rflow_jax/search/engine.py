"""The engine of every search: many prompts at once, so that the generator is never without work.

The main thread feeds the generator: it takes images of any prompt and round that are ready to be made, a batch at a
time, and sends the next batch on its way before it waits for the last one. Pools of threads ask the verifier and the
language models meanwhile. Which images a prompt needs follows from its own verdicts alone (:mod:`.prompt_run`), so
nothing here, neither timing nor the order of answers, changes a result.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL.Image import Image

from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import Pending
from rflow_jax.search.progress import BusyClock, SearchProgress
from rflow_jax.search.prompt_search import PromptSearch, SearchTask, Step
from rflow_jax.utils.worker_pool import BatchingPool, wait_for
from rflow_jax.verifiers.base import Verdict, Verifier, score_images
from rflow_jax.writers.base import TextGenerator, WriterOutput

SAVERS = 2  # threads that read, encode and write images
PATIENCE = 0.5  # seconds between looks at what no thread announces


@dataclass(frozen=True)
class Models:
    """Who is asked; None for roles that a search does not need."""

    verifier: Verifier | None = None
    reflector: TextGenerator | None = None
    refiner: TextGenerator | None = None

    def close(self) -> None:
        """Gives up what is waiting."""
        for model in (self.verifier, self.reflector, self.refiner):
            if model is not None:
                model.close()


class Engine:
    """Runs the searches of many prompts.

    Args:
        pipe: the pipeline, with the corrector's LoRA if there are corrections.
        in_flight: prompts searched together.
        live: told what happens.
        enough: asked before each further call; a reason ends the run as soon as what is under way is done.
        now_and_then: called between batches.
    """

    def __init__(
        self,
        pipe: Any,
        models: Models,
        settings: SamplingConfig,
        in_flight: int,
        live: SearchProgress,
        clock: BusyClock,
        enough: Callable[[], str | None] = lambda: None,
        now_and_then: Callable[[], None] = lambda: None,
    ) -> None:
        self._pipes = {True: pipe, False: pipe.without_lora()}
        self._models = models
        self._settings = settings
        self._in_flight = in_flight
        self._live = live
        self._clock = clock
        self._enough = enough
        self._now_and_then = now_and_then
        self._changed = threading.Condition()
        self._ready: dict[bool, deque[SearchTask]] = {True: deque(), False: deque()}
        self._compiled: set[bool] = set()
        self._calls: dict[Step, BatchingPool] = {}
        self._saving = 0
        self._active = 0
        self._failure: BaseException | None = None
        self.stopped: str | None = None

    def run(self, prompts: Iterator[PromptSearch]) -> None:
        """Searches all prompts, which are opened one by one; if it ends early, ``stopped`` then says why."""
        self._prompts = prompts
        self._open_calls()
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

    def _open_calls(self) -> None:
        models = self._models
        steps: dict[Step, Any] = {"score": models.verifier, "reflect": models.reflector, "refine": models.refiner}
        for step, model in steps.items():
            if model is not None:
                call = partial(_score if step == "score" else _write, model)
                self._calls[step] = BatchingPool(
                    step, call, model.concurrency, model.batch_size, self._done, self._fail
                )

    def _generate(self) -> None:
        """Feeds the generator until nothing is left to do."""
        sent: tuple[list[SearchTask], Pending] | None = None
        while True:
            # While the device works, a batch that is not full had better wait for more.
            batch = self._take(full=sent is not None)
            if not batch and sent is None:
                if not self._wait():
                    return
                continue
            started = self._start(batch) if batch else None
            if sent is not None:
                self._receive(*sent)
            sent = started
            self._now_and_then()

    def _take(self, full: bool) -> list[SearchTask]:
        """Images of one kind that are ready to be made, the fullest batch first; none while there are too few."""
        size = self._pipes[True].images_at_once(self._settings)
        with self._changed:
            self._raise()
            kind = max(self._ready, key=lambda kind: min(len(self._ready[kind]), size))
            waiting = self._ready[kind]
            if self.stopped or not waiting or (full and len(waiting) < size):
                return []
            return [waiting.popleft() for _ in range(min(size, len(waiting)))]

    def _start(self, batch: list[SearchTask]) -> tuple[list[SearchTask], Pending]:
        kind = batch[0].corrects
        requests = [work.run.request(work) for work in batch]
        self._clock.sent(compiles=kind not in self._compiled)
        self._compiled.add(kind)
        return batch, self._pipes[kind].start(requests, self._settings)

    def _receive(self, batch: Sequence[SearchTask], pending: Pending) -> None:
        images = pending.images()
        self._clock.arrived()
        self._live.made(len(images))
        for work, image in zip(batch, images, strict=True):
            self._submit_image(work, image)

    def _submit_image(self, work: SearchTask, image: Image | None) -> None:
        with self._changed:
            self._saving += 1
        self._savers.submit(self._save, work, image)

    def _save(self, work: SearchTask, image: Image | None) -> None:
        """Stores an image that was made, or one that is given."""
        try:
            image = work.run.given_image(work) if image is None else image
            work.run.folder.write_image(work.run.place(work), image)
            self._done(work, None)
        except BaseException as error:
            self._fail(error)
        finally:
            with self._changed:
                self._saving -= 1
                self._changed.notify_all()

    def _done(self, work: SearchTask, result: Any) -> None:
        self._tell(work, result)
        with self._changed:
            self._dispatch(work.run.done(work, result))
            if any(calls.waiting for calls in self._calls.values()):
                self._may_ask()
            if work.run.finished:
                self._close_prompt(work.run)
                self._open_prompts()
            self._changed.notify_all()

    def _tell(self, work: SearchTask, result: Any) -> None:
        if isinstance(result, Verdict):
            self._live.judged(None if result.scored else result.error or "not a number")
            if result.scored and result.error:
                self._live.member_failed(result.error)
        elif isinstance(result, WriterOutput) and result.error is not None:
            self._live.text_failed("reflection" if work.step == "reflect" else "refined prompt", result.error)

    def _dispatch(self, works: Sequence[SearchTask]) -> None:
        for work in works:
            if work.step == "draw":
                self._ready[work.corrects].append(work)
            elif work.step == "take":
                self._submit_image(work, None)
            elif self._may_ask():
                self._calls[work.step].submit(work)

    def _may_ask(self) -> bool:
        """Whether further questions may be asked; if not, those that wait for their turn are dropped."""
        if not self.stopped:
            self.stopped = self._enough()
            if self.stopped:
                for calls in self._calls.values():
                    calls.cancel_pending()
        return not self.stopped

    def _open_prompts(self) -> None:
        """Begins further prompts while there is room; those that need nothing more are done with at once."""
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

    def _wait(self) -> bool:
        """Until there is something to generate; false when there will be nothing more."""
        with self._changed:
            while True:
                self._raise()
                busy = self._saving or any(calls.asked for calls in self._calls.values())
                if self.stopped and not busy:
                    return False
                if not self._active:
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


def _score(verifier: Verifier, works: Sequence[SearchTask]) -> list[Verdict]:
    images = [work.run.folder.read_image(work.run.place(work)) for work in works]
    return score_images(verifier, images, [work.run.folder.entry for work in works])


def _write(writer: TextGenerator, works: Sequence[SearchTask]) -> list[WriterOutput]:
    return writer.write([work.run.case(work) for work in works])
