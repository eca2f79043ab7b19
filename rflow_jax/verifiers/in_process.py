"""What verifiers that run in this process have in common: bad images stay alone, the others fill batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from PIL.Image import Image

from rflow_jax.each import BATCHES_AT_ONCE, do_each
from rflow_jax.errors import InputError
from rflow_jax.images import decoded
from rflow_jax.text import require_text
from rflow_jax.verifiers.base import Verdict

Prepared = TypeVar("Prepared")
BATCHES_A_CALL = 2 * BATCHES_AT_ONCE  # half of them are prepared while the device works on the others
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
        prepare: (image in RGB, prompt) -> what the model is given; may raise InputError.
        score: one verdict for each that could be prepared, in order.
        batch_size: of the model; bounds how many are prepared at once.
        closed: once it is set, what is not begun is unscored, with ``CLOSED`` as the reason.
    """

    def prepared(pair: tuple[Image, Mapping[str, Any]]) -> Prepared:
        image, item = pair
        return prepare(decoded(image), prompt_of(item))

    found = do_each(list(zip(images, items, strict=True)), prepared, score, batch_size=batch_size, closed=closed)
    return [
        _unscored(verdict, item) if isinstance(verdict, InputError) else verdict
        for verdict, item in zip(found, items, strict=True)
    ]


def prompt_of(item: Mapping[str, Any]) -> str:
    """The prompt in an image's metadata; raises InputError where there is none, or no text."""
    prompt = item.get("prompt")
    if not isinstance(prompt, str):
        raise InputError("the metadata has no prompt")
    return require_text(prompt, "the prompt")


def unscored_number(what: str) -> Verdict:
    """The verdict on an image for which the model computed no number."""
    return Verdict(score=None, error=f"the model's {what} is not a number; float32 may help (dtype)")


def _unscored(error: InputError, item: Mapping[str, Any]) -> Verdict:
    log.warning("no score for an image of %r: %s", str(item.get("prompt"))[:60], error)
    return Verdict(score=None, error=str(error))
