"""Questions and answers."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image, new

from rflow_jax.utils.images import png_bytes


class ChatError(Exception):
    """A question without a usable answer after its retries; the message is the reason, in one line.

    The message is ``CLOSED`` if the chat was closed before: asking again later may succeed.

    Attributes:
        missing: whether the server failed, so that nothing is known of what was asked.
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class UnusableAnswer(Exception):
    """An answer that arrived but cannot be used; asking again may help.

    Attributes:
        said: what the model wrote, where that is known.
    """

    said: str = ""


class UnfitReply(UnusableAnswer):
    """A reply that no server of this kind gives, or that lacks what each must have: perhaps it is another one."""


@dataclass(frozen=True)
class ResponseSchema:
    """The JSON schema of an answer, in the subset that strict servers accept.

    Servers may ignore it, so the question must also say it in words.
    """

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: may be empty.
        cut: whether it was truncated at the token limit.
        tokens: the likeliest first tokens with their log-probabilities, if requested.
    """

    text: str
    cut: bool = False
    tokens: tuple[tuple[str, float], ...] = ()

    def require_text(self) -> str:
        """The answer without thoughts and markup; raises UnusableAnswer if it is truncated or there is none."""
        if self.cut:
            raise UnusableAnswer("the answer was cut at the limit of tokens; raise max_tokens")
        if not self.text.strip():
            raise UnusableAnswer("the answer is empty")
        from rflow_jax.openai_client.answer_text import only_answer

        return only_answer(self.text)


@dataclass(frozen=True)
class ChatRequest:
    """A question.

    Attributes:
        messages: the chat so far.
        parse: turns the answer into a value, or raises ``UnusableAnswer``.
        form: the schema of the answer.
        options: further fields of the request; they override the endpoint's settings.
        expected: what the answer must be, in words.
    """

    messages: Sequence[Mapping[str, Any]]
    parse: Callable[[Answer], Any]
    form: ResponseSchema | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    expected: str = "a text"


PROBE_PROMPT = "a red square"


def probe_picture() -> Image:
    """A small picture for a first question, of a size that every model takes; it shows ``PROBE_PROMPT``."""
    return new("RGB", (128, 128), "red")


PLAIN_QUESTION = ChatRequest([{"role": "user", "content": "Answer with the word yes."}], Answer.require_text)
"""A question that every chat model can answer."""


def encodable(text: str) -> str:
    """The text without lone surrogates, which JSON may contain but files and requests may not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def words(text: str) -> dict[str, Any]:
    """A text part of a message."""
    return {"type": "text", "text": encodable(text)}


def image_part(image: Image) -> dict[str, Any]:
    """An image part of a message."""
    url = "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def vision_messages(
    system: str, first: str | Image, second: str | Image, earlier: Sequence[tuple[str | Image, str | Image]] = ()
) -> list[dict[str, Any]]:
    """Chat messages: instructions, then earlier texts and images in pairs, then a text and an image, in this order."""
    shown = [part for pair in (*earlier, (first, second)) for part in pair]
    parts = [words(part) if isinstance(part, str) else image_part(part) for part in shown]
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def only_object(text: str) -> dict[str, Any]:
    """The one JSON object in a text; a code fence or prose around it is allowed.

    Raises:
        UnusableAnswer: there is none or more than one, or it is truncated, repeats a key or contains NaN or infinity.
    """
    start = text.find("{")
    if start < 0:
        raise UnusableAnswer("the answer contains no JSON object")
    try:
        found, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise UnusableAnswer(f"the answer is not valid JSON ({error})") from error
    if set("{}") & {*text[:start], *text[end:]}:
        raise UnusableAnswer("the answer contains more than one JSON object")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_no_number)
