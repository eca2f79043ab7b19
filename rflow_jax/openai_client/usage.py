"""Usage of paid models: counted across threads, shown live, kept across resumed runs."""

import threading
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Usage:
    """Totals of one or more roles; they add up with ``+``.

    Attributes:
        calls: questions asked, however often each was tried.
        attempts: requests sent for them.
        failures: questions without a usable answer.
        in_flight: requests that are waiting for an answer.
        prompt_tokens: tokens read by the model, by the server's own count.
        completion_tokens: tokens written by the model, also in unusable answers.
        unmetered: answers without a count of tokens; the tokens and the cost lack them.
        cost: USD for the tokens; None: no price is known for some of them.
        converted: answers in another form than was asked for that could be read all the same.
    """

    calls: int = 0
    attempts: int = 0
    failures: int = 0
    in_flight: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0
    cost: float | None = 0.0
    converted: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        totals = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "cost"}
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        return Usage(**totals, cost=cost)

    def as_dict(self) -> dict[str, int | float | None]:
        """The totals for a file, without ``in_flight``; ``Usage(**d)`` reads them again."""
        return {name: value for name, value in asdict(self).items() if name != "in_flight"}


class UsageTracker:
    """Counts the usage of one role, from ``start`` (of a resumed run) on; threads may share it."""

    def __init__(self, start: Usage | None = None) -> None:
        self._total = start or Usage()
        self._lock = threading.Lock()

    def add(self, change: Usage) -> None:
        with self._lock:
            self._total += change

    def snapshot(self) -> Usage:
        with self._lock:
            return self._total
