"""What calls of paid models have used: counted by threads, shown live, kept over resumed runs."""

import threading
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Usage:
    """Totals of one or more roles; they add up with ``+``.

    Attributes:
        calls: questions asked, however often each was tried.
        attempts: requests sent for them.
        failures: questions that got no usable answer.
        in_flight: requests that wait for their answer at this moment.
        prompt_tokens: tokens read by the model, by the server's own count.
        completion_tokens: tokens written by the model, also in answers that could not be used.
        unmetered: answers that came without a count of tokens; the tokens and the cost are too low by them.
        cost: USD for the tokens; None: no price is known for some of them.
    """

    calls: int = 0
    attempts: int = 0
    failures: int = 0
    in_flight: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    cost: float | None = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.calls + other.calls,
            self.attempts + other.attempts,
            self.failures + other.failures,
            self.in_flight + other.in_flight,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.unmetered + other.unmetered,
            None if self.cost is None or other.cost is None else self.cost + other.cost,
        )

    def as_dict(self) -> dict[str, int | float | None]:
        """The totals for a file; ``Usage(**d)`` reads them again. What is in flight is no total and is left out."""
        return {name: value for name, value in asdict(self).items() if name != "in_flight"}


class UsageTracker:
    """Counts the usage of one role; may be used by several threads at once.

    Args:
        start: what an earlier, interrupted run has used.
    """

    def __init__(self, start: Usage | None = None) -> None:
        self._total = start or Usage()
        self._lock = threading.Lock()

    def add(self, change: Usage) -> None:
        """Adds to the totals."""
        with self._lock:
            self._total += change

    def snapshot(self) -> Usage:
        """The totals at this moment."""
        with self._lock:
            return self._total
