"""Several verifiers together; images are compared by rank aggregation (:mod:`rflow_jax.verifiers.ranking`)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from rflow_jax.errors import InputError, serving
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.utils.batching import CLOSED
from rflow_jax.utils.worker_pool import BatchingPool, wait_for
from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.base import (
    EnsembleVerdict,
    MemberVerdict,
    MissingVerdict,
    Verdict,
    Verifier,
    normalize_verdict,
    score_images,
)
from rflow_jax.verifiers.config import EnsembleVerifierConfig


class EnsembleVerifier:
    """Asks every member about every image: those over HTTP at the same time, those in this process in turn.

    Each member gets as many calls at once, with as many images each, as it takes; images of different calls of
    ``score`` share a member's batch.

    Args:
        probe: whether the members over HTTP ask a first question, before the others load their models.

    Raises:
        InputError: a member cannot be made.
        ServiceError: a member's service did not take the first question.
    """

    def __init__(
        self, config: EnsembleVerifierConfig, meter: UsageTracker | None = None, *, probe: bool = False
    ) -> None:
        device = threading.Lock()
        made: dict[int, _Member] = {}
        try:
            for index in sorted(range(len(config.members)), key=lambda k: not config.members[k].asks_endpoint):
                member, place = config.members[index], f"members[{index}]"
                try:
                    with serving(place):
                        verifier = make_verifier(member, meter, probe=probe)
                except InputError as error:
                    raise InputError(f"{place} of the ensemble: {error}") from error
                assert verifier is not None
                turn = nullcontext() if member.asks_endpoint or verifier.concurrency > 1 else device
                made[index] = _Member(place, verifier, config.member_weights[index], turn)
        except BaseException:
            self._members = list(made.values())
            self.close()
            raise
        self._members = [made[index] for index in sorted(made)]
        verifiers = [member.verifier for member in self._members]
        names = [verifier.name for verifier in verifiers]
        # Equal names are numbered.
        self._names = [f"{n} {names[: k + 1].count(n)}" if names.count(n) > 1 else n for k, n in enumerate(names)]
        self.name = f"ensemble of {', '.join(self._names)}"
        self.batch_size = max(verifier.batch_size for verifier in verifiers)
        # Enough for the member that takes most images at once.
        most = max(verifier.concurrency * verifier.batch_size for verifier in verifiers)
        self.concurrency = -(-most // self.batch_size)

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order; it holds the members' own, also those that failed."""
        pairs = list(zip(images, items, strict=True))
        asked = [[member.ask(*pair) for pair in pairs] for member in self._members]
        columns = [[future.result() for future in column] for column in asked]
        return [self._verdict(row) for row in zip(*columns, strict=True)]

    def close(self) -> None:
        """Cancels the pending calls of every member."""
        for member in self._members:
            member.close()
        wait_for(*(member.calls for member in self._members))  # they may have waited for other members' turns

    def _verdict(self, verdicts: Sequence[Verdict]) -> Verdict:
        """The verdicts of all members; missing as a whole if one is."""
        missing = [f"{name}: {one.error}" for name, one in zip(self._names, verdicts, strict=True) if one.missing]
        if missing:
            return MissingVerdict(None, error="; ".join(missing))
        members = [
            MemberVerdict(name, member.weight, normalize_verdict(verdict))
            for name, member, verdict in zip(self._names, self._members, verdicts, strict=True)
        ]
        scored = [member for member in members if member.verdict.scored]
        failed = [member for member in members if not member.verdict.scored]
        return EnsembleVerdict(
            score=None,
            explanation="\n".join(f"{member.name}: {member.verdict.evaluation()}" for member in scored),
            error="; ".join(f"{member.name}: {member.verdict.error}" for member in failed) or None,
            members=tuple(members),
        )


@dataclass(frozen=True, eq=False)
class _Task:
    """One image for one member to score."""

    image: Image
    item: Mapping[str, Any]
    answer: Future[Verdict] = field(default_factory=Future)


class _Member:
    """One verifier of an ensemble, with threads of its own.

    Args:
        place: in the configuration, for messages.
        turn: held during a call.
    """

    def __init__(self, place: str, verifier: Verifier, weight: float, turn: AbstractContextManager[Any]) -> None:
        self.place, self.verifier, self.weight = place, verifier, weight
        self._turn = turn
        self._lock = threading.Lock()
        self._waiting: set[Future[Verdict]] = set()
        self._closed = False
        limits = verifier.concurrency, verifier.batch_size
        self.calls = BatchingPool(verifier.name, self._score, *limits, self._answer, self._fail)

    def ask(self, image: Image, item: Mapping[str, Any]) -> Future[Verdict]:
        """The future verdict; after ``close``, and for pending images, it is unscored with ``CLOSED`` as the reason."""
        task = _Task(image, item)
        with self._lock:
            if self._closed:
                task.answer.set_result(Verdict(None, error=CLOSED))
                return task.answer
            self._waiting.add(task.answer)
        task.answer.add_done_callback(self._forget)
        self.calls.submit(task)
        return task.answer

    def close(self) -> None:
        """Cancels pending calls."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
        self.calls.close()
        self.verifier.close()
        for answer in waiting:
            with suppress(InvalidStateError):  # it has come meanwhile
                answer.set_result(Verdict(None, error=CLOSED))

    def _score(self, tasks: Sequence[_Task]) -> list[Verdict]:
        with self._turn:
            if self._closed:  # while it waited for its turn
                return [Verdict(None, error=CLOSED)] * len(tasks)
            with serving(self.place):
                return score_images(self.verifier, [task.image for task in tasks], [task.item for task in tasks])

    def _answer(self, task: _Task, verdict: Verdict) -> None:
        with suppress(InvalidStateError):
            task.answer.set_result(verdict)

    def _fail(self, error: BaseException) -> None:
        """Passes a bug in the verifier to all who wait, and so ends the run."""
        with self._lock:
            waiting = list(self._waiting)
        for answer in waiting:
            with suppress(InvalidStateError):
                answer.set_exception(error)

    def _forget(self, answer: Future[Verdict]) -> None:
        with self._lock:
            self._waiting.discard(answer)
