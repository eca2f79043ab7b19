"""Searches without models: a pipeline that draws at random, a verifier and writers that answer from what they see."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rflow_jax.generation.config import SamplingConfig
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.search.config import Kind, NoiseStage, ReflectStage, SearchConfig
from rflow_jax.search.engine import Engine, Models
from rflow_jax.search.progress import BusyClock, SearchProgress
from rflow_jax.search.prompt_folder import PromptFolder, finished_records, read_records
from rflow_jax.search.prompt_search import PromptSearch, SearchContext, SearchTask
from rflow_jax.testing.openai_server import score_of
from rflow_jax.utils.images import png_bytes
from rflow_jax.verifiers.base import Verdict
from rflow_jax.writers.base import WriterInput, WriterOutput
from tests.kit.fake_pipeline import FakePipeline, picture

ENTRIES: dict[int, dict[str, Any]] = {
    3: {"tag": "counting", "prompt": "two owls"},
    4: {"prompt": "two owls"},
    5: {"prompt": "a red drum"},
}
CONFIG = SearchConfig(
    model="m",
    lora="l",
    seed=9,
    prompts_in_flight=2,
    noise=NoiseStage(2, 2),
    reflect=ReflectStage(3, 2, history=1),
    sampling=SamplingConfig(height=16, width=16, condition_size=16, batch_size=3),
)
PRICE = 0.01  # USD for each answer


def jitter(seed: int, longest: float) -> Callable[[], None]:
    """Waits for another while at each call; 0 never waits."""
    drawn = random.Random(seed)
    return lambda: time.sleep(drawn.random() * longest) if longest else None


@dataclass
class _Asked:
    """Counts calls; the first two arguments are what a class named in a configuration is made with."""

    meter: UsageTracker | None = None
    concurrency: int = 4
    batch_size: int = 1
    wait: Callable[[], None] = lambda: None
    most_at_once: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._at_once = 0

    @contextmanager
    def asked(self, number: int) -> Iterator[None]:
        """A call with so many questions."""
        assert 0 < number <= self.batch_size
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.wait()
            yield
        finally:
            with self._lock:
                self._at_once -= 1
            if self.meter:
                self.meter.add(Usage(calls=number, attempts=number, prompt_tokens=7 * number, cost=PRICE * number))

    def close(self) -> None:
        """As the protocols ask."""
        self.closed = True


@dataclass
class HashVerifier(_Asked):
    """Scores by the image's bytes; remembers what it saw.

    Attributes:
        fails: says which images it cannot score.
    """

    name: str = "hash"
    fails: Callable[[bytes], bool] = lambda png: False
    seen: Counter[str] = field(default_factory=Counter)

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image."""
        with self.asked(len(images)):
            return [self._verdict(png_bytes(image), item) for image, item in zip(images, items, strict=True)]

    def _verdict(self, png: bytes, item: Mapping[str, Any]) -> Verdict:
        with self._lock:
            self.seen[hashlib.sha256(png).hexdigest()] += 1
        if self.fails(png):
            return Verdict(None, error="gone")
        return Verdict(score_of(png), explanation=f"as {item['prompt']}", raw={"of": item.get("tag")})


@dataclass
class HashWriter(_Asked):
    """Writes what it was told, with a line separator that is no line break in JSON; remembers the cases.

    Attributes:
        fails: says where it writes nothing.
    """

    name: str = "writes"
    fails: Callable[[WriterInput], bool] = lambda case: False
    cases: list[WriterInput] = field(default_factory=list)

    def write(self, cases: Sequence[WriterInput]) -> list[WriterOutput]:
        """One text a case."""
        with self.asked(len(cases)):
            self.cases += cases
            return [
                WriterOutput(None, "no answer") if self.fails(case) else WriterOutput(self.text(case)) for case in cases
            ]

    def text(self, case: WriterInput) -> str:
        """Other words for any other case."""
        pictures = [case.image, *[past.image for past in case.history]]
        seen = [hashlib.sha256(png_bytes(image)).hexdigest()[:6] for image in pictures]
        told = (case.current_prompt, case.evaluation, case.last_reflection, case.reflection, case.history and 1)
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:6]
        return f"{self.name}\u2028{digest} on {' and '.join(seen)}\x85."


def config_verifier(config: Any, meter: UsageTracker) -> HashVerifier:
    """The verifier by its name in a configuration: ``tests.kit.searching:config_verifier``."""
    return HashVerifier(meter, config.concurrency)


def config_writer(config: Any, default_prompt: Path, meter: UsageTracker) -> HashWriter:
    """A writer by its name in a configuration: ``tests.kit.searching:config_writer``."""
    return HashWriter(meter, config.concurrency, name=default_prompt.stem)


def models(kind: Kind = "reflect", **changes: Any) -> Models:
    """Those that a kind of search asks; changes are fields of all of them."""
    return Models(
        HashVerifier(**changes),
        HashWriter(name="reflection", **changes) if kind == "reflect" else None,
        HashWriter(name="refine", **changes) if kind != "noise" else None,
    )


def prompt_run(
    out: Path,
    index: int = 5,
    config: SearchConfig = CONFIG,
    kind: Kind = "reflect",
    given: Sequence[Path] = (),
    verified: bool = True,
) -> PromptSearch:
    """The search of one prompt."""
    terms = SearchContext(
        config.seed,
        verified,
        config.reflect.history,
        config.noise.noise_similarity,
        config.reflect.include_initial_images,
        {"model": config.model, "lora": config.lora, "settings": {}},
    )
    strategy = config.strategy(kind, len(given) if given else None)
    return PromptSearch(PromptFolder(out, index, ENTRIES[index]), strategy, terms, given)


def answer(
    work: SearchTask, asked: Models, settings: SamplingConfig = CONFIG.sampling
) -> WriterOutput | Verdict | None:
    """Does a work at once, without an engine."""
    run = work.run
    if work.step == "score":
        image = run.folder.read_image(run.place(work))
        assert asked.verifier is not None
        return asked.verifier.score([image], [run.folder.entry])[0]
    if work.step in ("reflect", "refine"):
        writer = asked.reflector if work.step == "reflect" else asked.refiner
        assert writer is not None
        return writer.write([run.case(work)])[0]
    image = run.given_image(work) if work.step == "take" else picture(run.request(work), work.corrects, settings)
    run.folder.write_image(run.place(work), image)
    return None


def drive(run: PromptSearch, asked: Models, order: random.Random, steps: int | None = None) -> list[tuple[int, str]]:
    """Does what a prompt needs, one thing after another in any order; returns (position, step) of each.

    Args:
        steps: stop after so many.
    """
    done: list[tuple[int, str]] = []
    todo = run.begin()
    while todo and (steps is None or len(done) < steps):
        work = todo.pop(order.randrange(len(todo)))
        done.append((work.position, work.step))
        todo += run.done(work, answer(work, asked))
    return done


@dataclass
class Ran:
    """A search that is over."""

    out: Path
    engine: Engine
    live: SearchProgress
    pipe: FakePipeline
    models: Models
    most_open: int

    def records(self, index: int) -> list[dict[str, Any]]:
        """Of a prompt."""
        return read_records(self.out / f"{index:05d}")


def search(
    out: Path,
    config: SearchConfig = CONFIG,
    kind: Kind = "reflect",
    *,
    pipe: FakePipeline | None = None,
    asked: Models | None = None,
    entries: Mapping[int, dict[str, Any]] = ENTRIES,
    given: Mapping[int, Sequence[Path]] | None = None,
    enough: Callable[[], str | None] = lambda: None,
) -> Ran:
    """Searches with an engine; prompts that are done are left out."""
    pipe, asked = pipe or FakePipeline(), asked or models(kind)
    opened: list[PromptSearch] = []
    most_open = 0

    def prompts() -> Iterator[PromptSearch]:
        nonlocal most_open
        for index in (index for index in entries if finished_records(out, index) is None):
            opened.append(prompt_run(out, index, config, kind, (given or {}).get(index, ()), bool(asked.verifier)))
            most_open = max(most_open, sum(not run.finished for run in opened))
            yield opened[-1]

    clock = BusyClock()
    live = SearchProgress(config.strategy(kind).images() * len(entries), clock, Usage)
    engine = Engine(pipe, asked, config.sampling, config.prompts_in_flight, live, clock, enough)
    with live:
        engine.run(prompts())
    return Ran(out, engine, live, pipe, asked, most_open)


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def with_batch(config: SearchConfig, size: int) -> SearchConfig:
    """The same search with another size of batches."""
    return replace(config, sampling=replace(config.sampling, batch_size=size))
