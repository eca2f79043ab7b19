"""Several verifiers at once; where images are compared, their ranks decide (:mod:`rflow_jax.verifiers.ranking`)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from rflow_jax.errors import InputError
from rflow_jax.openai_client import CLOSED
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.utils.worker_pool import BatchingPool, wait_for
from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.base import EnsembleVerdict, MemberVerdict, Verdict, Verifier, normalize_verdict, score_images
from rflow_jax.verifiers.config import ENSEMBLE, VerifierConfig


class EnsembleVerifier:
    """Asks every member about every image: those over HTTP at the same time, those in this process in turn.

    Each member gets as many calls at once, with as many images each, as it takes; images of different calls of
    ``score`` share a member's batch.

    Raises:
        InputError: a member cannot be made.
    """

    def __init__(self, config: VerifierConfig, meter: UsageTracker | None = None) -> None:
        device = threading.Lock()
        self._members: list[_Member] = []
        try:
            for place, (member, weight) in enumerate(zip(config.members, config.weights, strict=True)):
                verifier = _made(member, meter, place)
                turn = nullcontext() if member.asks_endpoint or verifier.concurrency > 1 else device
                self._members.append(_Member(verifier, weight, turn))
        except BaseException:
            self.close()
            raise
        verifiers = [member.verifier for member in self._members]
        self._names = _told_apart([verifier.name for verifier in verifiers])
        self.name = f"ensemble of {', '.join(self._names)}"
        self.batch_size = max(verifier.batch_size for verifier in verifiers)
        # Enough for the member that takes most images at once.
        most = max(verifier.concurrency * verifier.batch_size for verifier in verifiers)
        self.concurrency = -(-most // self.batch_size)

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order; it holds the members' own, also those that failed."""
        pairs = list(zip(images, items, strict=True))
        asked = [[member.ask(*pair) for pair in pairs] for member in self._members]
        told = [[future.result() for future in column] for column in asked]
        return [self._verdict(row) for row in zip(*told, strict=True)]

    def close(self) -> None:
        """Gives up what is waiting with every member."""
        for member in self._members:
            member.close()
        wait_for(*(member.calls for member in self._members))  # they may have waited for other members' turns

    def _verdict(self, verdicts: Sequence[Verdict]) -> EnsembleVerdict:
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


def _made(member: VerifierConfig, meter: UsageTracker | None, place: int) -> Verifier:
    try:
        verifier = make_verifier(member, meter)
    except InputError as error:
        raise InputError(f"{ENSEMBLE}.options.members[{place}]: {error}") from error
    assert verifier is not None
    return verifier


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names; those that are alike are numbered."""
    return [f"{name} {names[: k + 1].count(name)}" if names.count(name) > 1 else name for k, name in enumerate(names)]


@dataclass(frozen=True, eq=False)
class _Work:
    """One image before one member."""

    image: Image
    item: Mapping[str, Any]
    answer: Future[Verdict] = field(default_factory=Future)


class _Member:
    """One verifier of an ensemble, with threads of its own.

    Args:
        turn: held during a call.
    """

    def __init__(self, verifier: Verifier, weight: float, turn: AbstractContextManager[Any]) -> None:
        self.verifier, self.weight = verifier, weight
        self._turn = turn
        self._lock = threading.Lock()
        self._waiting: set[Future[Verdict]] = set()
        self._closed = False
        limits = verifier.concurrency, verifier.batch_size
        self.calls = BatchingPool(verifier.name, self._score, *limits, self._answer, self._fail)

    def ask(self, image: Image, item: Mapping[str, Any]) -> Future[Verdict]:
        """The verdict to come; after ``close``, and for what waits at that moment, the reason is ``CLOSED``."""
        work = _Work(image, item)
        with self._lock:
            if self._closed:
                work.answer.set_result(Verdict(None, error=CLOSED))
                return work.answer
            self._waiting.add(work.answer)
        work.answer.add_done_callback(self._forget)
        self.calls.submit(work)
        return work.answer

    def close(self) -> None:
        """Gives up what is waiting."""
        with self._lock:
            self._closed = True
            waiting = list(self._waiting)
        self.calls.close()
        self.verifier.close()
        for answer in waiting:
            with suppress(InvalidStateError):  # it has come meanwhile
                answer.set_result(Verdict(None, error=CLOSED))

    def _score(self, works: Sequence[_Work]) -> list[Verdict]:
        with self._turn:
            if self._closed:  # while it waited for its turn
                return [Verdict(None, error=CLOSED)] * len(works)
            return score_images(self.verifier, [work.image for work in works], [work.item for work in works])

    def _answer(self, work: _Work, verdict: Verdict) -> None:
        with suppress(InvalidStateError):
            work.answer.set_result(verdict)

    def _fail(self, error: BaseException) -> None:
        """A bug in the verifier ends the run, whoever waits for it."""
        with self._lock:
            waiting = list(self._waiting)
        for answer in waiting:
            with suppress(InvalidStateError):
                answer.set_exception(error)

    def _forget(self, answer: Future[Verdict]) -> None:
        with self._lock:
            self._waiting.discard(answer)
