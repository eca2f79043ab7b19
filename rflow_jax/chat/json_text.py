"""Strict reading of a JSON object that a model wrote."""

import json
from typing import Any

from rflow_jax.chat.question import UnusableAnswer


def only_object(text: str) -> dict[str, Any]:
    """The one JSON object in a text; a code fence or prose around it is put up with.

    Raises:
        UnusableAnswer: there is none or more than one, or it is cut, repeats a key or holds a number that is none.
    """
    start = text.find("{")
    if start < 0:
        raise UnusableAnswer("the answer holds no JSON object")
    try:
        found, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise UnusableAnswer(f"the answer is not valid JSON ({error})") from error
    if set("{}") & {*text[:start], *text[end:]}:
        raise UnusableAnswer("the answer holds more than one JSON object")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_no_number)
