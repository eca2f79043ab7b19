"""Live progress of a search, and its final counts."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rflow_jax.openai_client.usage import Usage

LINE_EVERY = 60.0  # seconds between lines where standard error is not a terminal


class BusyClock:
    """How much of the time the generator works, since every program that it needs has been compiled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sent = 0
        self._began = self._since = 0.0
        self._busy = 0.0

    def sent(self, compiles: bool) -> None:
        """A batch is on its way; the first of a program compiles it, and the clock starts again behind it."""
        with self._lock:
            now = time.monotonic()
            if not self._sent:
                self._since = now
            self._sent += 1
            if compiles:
                self._began = 0.0

    def arrived(self) -> None:
        """A batch is there."""
        with self._lock:
            now = time.monotonic()
            self._sent -= 1
            if not self._began:
                self._began, self._busy = now, 0.0
            else:
                self._busy += now - self._since
            self._since = now

    @property
    def fraction(self) -> float | None:
        """Busy time over total time; None before the first batch."""
        with self._lock:
            now = time.monotonic()
            if not self._began or now == self._began:
                return None
            return (self._busy + (now - self._since if self._sent else 0.0)) / (now - self._began)


class SearchProgress:
    """Counts, and shows them as a bar or as lines; safe to use from several threads.

    Args:
        images: that the run will make at most.
        usage: what the models have used so far, with the calls in flight.
    """

    def __init__(self, images: int, clock: BusyClock, usage: Callable[[], Usage]) -> None:
        self.images = self.scored = self.unscored = self.partly_scored = self.text_failures = 0
        self.without_image = 0
        self.first_failure: str | None = None
        self.questions: Counter[str] = Counter()  # those that stayed without an answer, by their role
        self.first_reason = ""
        self._total = images
        self._clock = clock
        self._usage = usage
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._ended = threading.Event()
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("images"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            _Note(self.note),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("images", total=images)

    def made(self, count: int = 1) -> None:
        """Counts further images."""
        with self._lock:
            self.images += count
        self._progress.update(self._task, advance=count)

    def not_made(self, error: str) -> None:
        """Counts an image that could not be made."""
        with self._lock:
            self._remember("image", error)
        self._progress.update(self._task, advance=1)

    def unmade(self, images: int) -> None:
        """Counts images of a prompt that could not be made, by this process or by an earlier one."""
        with self._lock:
            self.without_image += images

    def spared(self, images: int) -> None:
        """Lowers the total by images that are not needed or existed before."""
        with self._lock:
            self._total -= images
        self._progress.update(self._task, total=self._total)

    def judged(self, error: str | None) -> None:
        """Counts an image that was scored, or could not be because of ``error``."""
        with self._lock:
            self.scored += error is None
            self.unscored += error is not None
            self._remember("score", error)

    def member_failed(self, error: str) -> None:
        """Counts an image that only some members of an ensemble could score."""
        with self._lock:
            self.partly_scored += 1
            self._remember("score", error)

    def text_failed(self, what: str, error: str) -> None:
        """Counts a reflection or refinement that could not be written."""
        with self._lock:
            self.text_failures += 1
            self._remember(what, error)

    def unanswered(self, role: str, error: str) -> None:
        """Counts a question that a service left without an answer."""
        with self._lock:
            self.first_reason = self.first_reason or f"{role}: {error}"
            self.questions[role] += 1

    def without_answer(self) -> str | None:
        """How many questions of which role stayed without an answer; None if there are none."""
        if not self.questions:
            return None
        counts = [f"{count} of the {role}" for role, count in sorted(self.questions.items())]
        return f"questions without an answer: {', '.join(counts)} ({self.first_reason})"

    @property
    def lacking(self) -> int:
        """Images, scores, texts and answers that were asked for and are not there."""
        return self.without_image + self.unscored + self.text_failures + self.questions.total()

    def _remember(self, what: str, error: str | None) -> None:
        if self.first_failure is None and error is not None:
            self.first_failure = f"{what}: {error}"

    def note(self) -> str:
        """Pace, busy time, calls, failures and cost, in a few words."""
        usage, fraction = self._usage(), self._clock.fraction
        with self._lock:
            pace = self.images / max(time.monotonic() - self._began, 1e-9)
            failures = self.lacking + self.partly_scored
        words = [f"{pace:.2f} images/s"]
        if fraction is not None:
            words.append(f"generator {fraction:.0%} busy")
        if usage.calls:
            words.append(f"{usage.in_flight} call{'' if usage.in_flight == 1 else 's'}")
        if failures:
            words.append(f"{failures} failure{'' if failures == 1 else 's'}")
        if usage.cost:
            words.append(f"${usage.cost:.2f}")
        return ", ".join(words)

    def __enter__(self) -> SearchProgress:
        self._progress.start()
        if self._progress.disable:
            threading.Thread(target=self._lines, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._progress.stop()

    def _lines(self) -> None:
        while not self._ended.wait(LINE_EVERY):
            print(f"{self.images} of {self._total} images, {self.note()}", file=sys.stderr, flush=True)


class _Note(ProgressColumn):
    """A column whose text is computed at every refresh."""

    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__()
        self._words = words

    def render(self, task: Task) -> Text:
        return Text(self._words())
