"""What goes wrong on the local OpenAI-compatible server, on purpose."""

import argparse
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from tests.kit.openai_answers import Call

FaultKind = Literal[
    "delay", "reorder", "status", "drop", "truncated", "cut_body", "half_body", "refusal", "empty", "off_schema",
    "no_logprobs",
]  # fmt: skip
STATUSES = (408, 409, 429, 500, 502, 503)


@dataclass
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: delay (answers late), reorder (the earlier a request came, the later its answer), status (an HTTP
            error), drop (the connection closes without an answer), truncated (the answer itself is cut),
            cut_body (the HTTP body is cut JSON), half_body (the connection closes in the middle of the body), refusal,
            empty, off_schema (an answer that lacks everything), no_logprobs.
        when: which calls it hits.
        times: how often it strikes; None: always.
        seconds: of a delay, or between two reordered answers.
        status: HTTP status.
        retry_after: value of the Retry-After header.
        message: what the server says about an HTTP error; ``{key}`` stands for the client's key.
    """

    kind: FaultKind
    when: Callable[[Call], bool] = lambda call: True
    times: int | None = None
    seconds: float = 0.05
    status: int = 500
    retry_after: float | str | None = None
    message: str = "out of order, key {key}"
    struck: int = field(default=0, init=False)


@dataclass(frozen=True)
class Chaos:
    """A share of the requests fails, spread over every kind of failure.

    Which ones, and how, follows from the seed, the request and how often it came before: never from timing.

    Attributes:
        rate: share of the requests that fail.
        seed: another one picks others.
        hang: seconds that a server which keeps its client waiting needs; longer than the client's time limit.
    """

    rate: float = 0.1
    seed: int = 0
    hang: float = 30.0

    def fault_for(self, call: Call) -> Fault | None:
        """What goes wrong with this request, if anything."""
        name = f"{self.seed} {call.digest} {call.attempt}"
        drawn = random.Random(hashlib.sha256(name.encode()).digest())
        return drawn.choice(self._kinds(call)) if drawn.random() < self.rate else None

    def _kinds(self, call: Call) -> list[Fault]:
        kinds = [Fault("status", status=status) for status in STATUSES if status != 429]
        kinds += [Fault("status", status=429, retry_after=0.2), Fault("delay", seconds=self.hang)]
        kinds += [Fault("drop"), Fault("half_body"), Fault("cut_body"), Fault("truncated"), Fault("refusal")]
        kinds += [Fault("empty")]
        return kinds + [Fault("off_schema")] * (call.role == "verify")  # a free text has no schema


def parse_fault(text: str) -> Fault:
    """``KIND[=NUMBER][:TIMES]``; the number is the status, or the seconds of a delay."""
    head, _, times = text.partition(":")
    kind, _, number = head.partition("=")
    if kind not in get_args(FaultKind):
        raise argparse.ArgumentTypeError(f"unknown fault {kind}: one of {', '.join(get_args(FaultKind))}")
    fault = Fault(kind, times=int(times) if times else None)  # pyright: ignore[reportArgumentType]
    if number and kind == "status":
        fault.status = int(number)
    elif number:
        fault.seconds = float(number)
    return fault
