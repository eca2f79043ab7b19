"""What a run shows while it works."""

import threading
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Counters:
    """Bars for images and scores with the failures beside them; safe to use from several threads."""

    def __init__(self, images: int, scores: int) -> None:
        self.images = 0
        self.scored = 0
        self.unscored = 0
        self.text_failures = 0
        self.first_failure: str | None = None
        self._lock = threading.Lock()
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:7}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._image_task = self._progress.add_task("images", total=images, note="")
        self._score_task = self._progress.add_task("scores", total=scores, note="", visible=scores > 0)

    def made(self, count: int) -> None:
        """So many further images exist."""
        with self._lock:
            self.images += count
        self._progress.update(self._image_task, advance=count)

    def judged(self, scored: int, reasons: Sequence[str]) -> None:
        """So many further images were scored; for the others, why they could not be."""
        unscored = len(reasons)
        with self._lock:
            self.scored += scored
            self.unscored += unscored
            self._remember(reasons)
        self._progress.update(self._score_task, advance=scored + unscored, note=self._note())

    def failed_texts(self, reasons: Sequence[str]) -> None:
        """Why further reflections or refinements could not be written; one reason each."""
        with self._lock:
            self.text_failures += len(reasons)
            self._remember(reasons)
        self._progress.update(self._score_task, note=self._note())

    def _remember(self, reasons: Sequence[str]) -> None:
        if self.first_failure is None and reasons:
            self.first_failure = reasons[0]

    def _note(self) -> str:
        failures = self.unscored + self.text_failures
        return f"{failures} failures" if failures else ""

    def __enter__(self) -> "Counters":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
