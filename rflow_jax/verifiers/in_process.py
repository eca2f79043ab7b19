"""What verifiers that run in this process have in common: bad images stay alone, the others fill batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from PIL.Image import Image

from rflow_jax.verifiers.base import Verdict

Prepared = TypeVar("Prepared")
BATCHES_AT_ONCE = 4  # images are prepared for so many batches, so that like ones find each other
log = logging.getLogger(__name__)


class Unscorable(Exception):
    """Why one image has no score, in words."""


def score_each(
    images: Sequence[Image],
    items: Sequence[Mapping[str, Any]],
    prepare: Callable[[Image, str], Prepared],
    score: Callable[[Sequence[Prepared]], Iterable[Verdict]],
    *,
    at_once: int,
) -> list[Verdict]:
    """One verdict an image, in order.

    Args:
        prepare: (image in RGB, prompt) -> what the model is given; may raise :class:`Unscorable`.
        score: one verdict for each that could be prepared, in order.
        at_once: images prepared before any is scored; bounds the memory of a call with thousands.
    """
    pairs = list(zip(images, items, strict=True))
    verdicts: list[Verdict] = []
    for start in range(0, len(pairs), at_once):
        verdicts += _score_some(pairs[start : start + at_once], prepare, score)
    return verdicts


def _score_some(
    pairs: Sequence[tuple[Image, Mapping[str, Any]]],
    prepare: Callable[[Image, str], Prepared],
    score: Callable[[Sequence[Prepared]], Iterable[Verdict]],
) -> list[Verdict]:
    prepared: dict[int, Prepared] = {}
    verdicts: dict[int, Verdict] = {}
    for k, (image, item) in enumerate(pairs):
        try:
            prepared[k] = prepare(decoded(image), prompt_of(item))
        except Unscorable as error:
            log.warning("no score for an image of %r: %s", str(item.get("prompt"))[:60], error)
            verdicts[k] = Verdict(score=None, error=str(error))
    found = score(list(prepared.values())) if prepared else ()
    verdicts |= dict(zip(prepared, found, strict=True))
    return [verdicts[k] for k in range(len(pairs))]


def decoded(image: Image) -> Image:
    """The image in RGB; raises :class:`Unscorable` where it cannot be decoded."""
    try:
        return image.convert("RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unscorable(f"the image cannot be decoded ({reason})") from error


def prompt_of(item: Mapping[str, Any]) -> str:
    """The prompt in an image's metadata; raises :class:`Unscorable` where there is none."""
    prompt = item.get("prompt")
    if not isinstance(prompt, str):
        raise Unscorable("the metadata has no prompt")
    return prompt


def require_fitting(tokens: int, context: int) -> None:
    """Raises :class:`Unscorable` for a prompt longer than the model can read."""
    if tokens > context:
        raise Unscorable(f"the prompt is too long: {tokens} tokens, the model reads {context}")


def unscored_number(what: str) -> Verdict:
    """The verdict on an image for which the model computed no number."""
    return Verdict(score=None, error=f"the model's {what} is not a number; float32 may help (dtype)")
