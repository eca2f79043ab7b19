"""The protocol of verifiers, which score how well an image shows its prompt, and their verdicts."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from PIL.Image import Image

from rflow_jax.errors import InputError, RunError
from rflow_jax.utils.batching import BATCHES_AT_ONCE, map_batched
from rflow_jax.utils.checks import require_text
from rflow_jax.utils.images import decoded


@dataclass(frozen=True)
class Verdict:
    """The verdict of a verifier on one image.

    Attributes:
        score: the score, or None if the image could not be scored.
        label: "yes" or "no" for verifiers that decide; the score is then the strength of that word.
        explanation: the verifier's reasons in words, for the reflection generator.
        raw: the verifier's answer as it came, for the record.
        error: why there is no score.
        missing: whether a service failed, so that nothing is known of the image (:class:`MissingVerdict`).
    """

    missing: ClassVar[bool] = False

    score: float | None
    label: str | None = None
    explanation: str = ""
    raw: Any = None
    error: str | None = None

    @property
    def scored(self) -> bool:
        """Whether there is a score to compare."""
        return self.score is not None and math.isfinite(self.score)

    @property
    def rank(self) -> tuple[int, float]:
        """Greater is better: "yes" before "no", yes by higher score, no by lower; unscored last."""
        if self.score is None or not self.scored:
            return (0, 0.0)
        return (1, -self.score) if self.label == "no" else (2, self.score)

    def evaluation(self) -> str:
        """The verdict in words."""
        if not self.scored:
            return "No evaluation of this image is available."
        label = f"{self.label}, " if self.label else ""
        return f"Overall: {label}{self.score:g}\n{self.explanation}".strip()


@dataclass(frozen=True)
class MissingVerdict(Verdict):
    """No verdict, for want of a service: it is recorded nowhere, and the image is asked about again."""

    missing: ClassVar[bool] = True


@dataclass(frozen=True)
class MemberVerdict:
    """The verdict of one member of an ensemble, and its weight."""

    name: str
    weight: float
    verdict: Verdict


@dataclass(frozen=True)
class EnsembleVerdict(Verdict):
    """The verdicts of an ensemble's members on one image.

    Only a set of them can be compared (:mod:`rflow_jax.verifiers.ranking`); the score, where there is one, is its
    mean rank in the set.

    Attributes:
        members: one verdict each, also of those that failed.
    """

    members: tuple[MemberVerdict, ...] = ()

    @property
    def scored(self) -> bool:
        """Whether any member scored it."""
        return any(member.verdict.scored for member in self.members)

    def evaluation(self) -> str:
        """The members' verdicts in words."""
        return self.explanation if self.scored else super().evaluation()


def normalize_verdict(verdict: Verdict) -> Verdict:
    """The verdict with a float as score, or with None, a reason, and nothing that JSON cannot represent."""
    if verdict.score is not None and type(verdict.score) is not float:
        try:
            verdict = replace(verdict, score=float(verdict.score))
        except (TypeError, ValueError, OverflowError):
            return replace(verdict, score=None, raw=None, error=verdict.error or f"the score is {verdict.score!r}")
    if verdict.scored:
        return verdict
    return replace(verdict, score=None, raw=None, error=verdict.error or f"the score is {verdict.score}")


def score_images(verifier: Verifier, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """One verdict an image, in order: the only caller of verifiers, which also checks what they return.

    Raises:
        RunError: the verifier returned something else.
    """
    try:
        found = verifier.score(list(images), [deepcopy(dict(item)) for item in items])  # it may change its own
    except InputError as error:
        if len(images) == 1:
            return [Verdict(None, error=str(error))]
        pairs = zip(images, items, strict=True)
        return [verdict for image, item in pairs for verdict in score_images(verifier, [image], [item])]
    expected = f"expected a list of Verdict, one for each of {len(images)} images"
    if not isinstance(found, (list, tuple)):
        raise RunError(f"verifier {verifier.name}: score returned {type(found).__name__}; {expected}")
    if len(found) != len(images):
        raise RunError(f"verifier {verifier.name}: score returned {len(found)} results; {expected}")
    if wrong := [type(one).__name__ for one in found if not isinstance(one, Verdict)]:
        raise RunError(f"verifier {verifier.name}: score returned a list with {wrong[0]}; {expected}")
    return list(found)


def read_verdict(stored: Mapping[str, Any]) -> Verdict:
    """A verdict that was stored as ``dataclasses.asdict`` makes it; raises KeyError or TypeError for anything else."""
    if "members" not in stored:
        return _checked(Verdict(**stored))
    members = (MemberVerdict(one["name"], one["weight"], read_verdict(one["verdict"])) for one in stored["members"])
    return _checked(EnsembleVerdict(**{**stored, "members": tuple(members)}))


def _checked(verdict: Verdict) -> Verdict:
    """The verdict; raises TypeError if a value has a wrong type."""
    number, text = (int, float, type(None)), (str, type(None))
    if not isinstance(verdict.score, number) or isinstance(verdict.score, bool):
        raise TypeError("score")
    if not all(isinstance(value, text) for value in (verdict.label, verdict.error, verdict.explanation)):
        raise TypeError("label, error or explanation")
    for member in verdict.members if isinstance(verdict, EnsembleVerdict) else ():
        if not isinstance(member.weight, (int, float)):
            raise TypeError("weight")
    return verdict


@runtime_checkable
class Verifier(Protocol):
    """Scores images against GenEval metadata (at least ``prompt``; ``tag`` and ``include`` where known)."""

    name: str
    """A short description for the record, such as "openai gpt-4o"; never an address or a key."""

    concurrency: int
    """Calls of ``score`` that may run at once (1 for a model in this process)."""

    batch_size: int
    """Images that a call takes at once (1 over HTTP)."""

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in the order of the images; an image that cannot be scored has one with an error.

        Where a service gave no answer it is a :class:`MissingVerdict`: the next run asks again.
        After an ``InputError`` (:func:`score_images`) each image of the call is asked about alone, and those that raise
        it again are unscored with its reason. Any other exception ends the run.
        """
        ...

    def close(self) -> None:
        """Cancels pending calls of all threads; their images come back unscored, with the reason."""
        ...


Prepared = TypeVar("Prepared")
BATCHES_A_CALL = 2 * BATCHES_AT_ONCE  # half of them are prepared while the device is busy with the others
log = logging.getLogger(__name__)


def score_each(
    images: Sequence[Image],
    items: Sequence[Mapping[str, Any]],
    prepare: Callable[[Image, str], Prepared],
    score: Callable[[Sequence[Prepared]], Iterable[Verdict]],
    *,
    batch_size: int,
    closed: threading.Event,
) -> list[Verdict]:
    """One verdict an image, in order; an image that cannot be prepared is unscored with the reason.

    Args:
        prepare: (image in RGB, prompt) -> input of the model; may raise InputError.
        score: one verdict for each that could be prepared, in order.
        batch_size: of the model; bounds how many are prepared at once.
        closed: once it is set, images not begun are unscored, with ``CLOSED`` as the reason.
    """

    def prepared(pair: tuple[Image, Mapping[str, Any]]) -> Prepared:
        image, item = pair
        return prepare(decoded(image), prompt_of(item))

    found = map_batched(list(zip(images, items, strict=True)), prepared, score, batch_size=batch_size, closed=closed)
    verdicts = []
    for verdict, item in zip(found, items, strict=True):
        if isinstance(verdict, InputError):
            log.warning("no score for an image of %r: %s", str(item.get("prompt"))[:60], verdict)
            verdict = Verdict(score=None, error=str(verdict))
        verdicts.append(verdict)
    return verdicts


def prompt_of(item: Mapping[str, Any]) -> str:
    """The prompt in an image's metadata; raises InputError if it is missing or not text."""
    prompt = item.get("prompt")
    if not isinstance(prompt, str):
        raise InputError("the metadata has no prompt")
    return require_text(prompt, "the prompt")


def unscored_number(what: str) -> Verdict:
    """The verdict on an image for which the model computed no number."""
    return Verdict(score=None, error=f"the model's {what} is not a number; float32 may help (dtype)")
