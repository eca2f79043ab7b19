"""The grades in a model's answer; another form is read if it can only mean one thing, and nothing is made up."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rflow_jax.openai_client.messages import Answer, UnusableAnswer, encodable, only_object

OVERALL = "overall"
_NUMBER = re.compile(r"\s*([0-9]{1,2}(?:\.[0-9]{1,9})?)\s*(?:(?:/|out of)\s*10(?:\.0)?\s*)?", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\s_-]+")


class Mark(BaseModel):
    """One graded aspect of an answer."""

    model_config = ConfigDict(strict=True)

    reason: str
    score: float = Field(ge=0, le=10, allow_inf_nan=False)


@dataclass(frozen=True)
class Grades:
    """All marks of an answer.

    Attributes:
        answer: the object as it came.
        converted: whether it had another form than was asked for.
    """

    marks: Mapping[str, Mark]
    answer: Mapping[str, Any]
    converted: bool


def read_grades(aspects: Sequence[str], answer: Answer) -> Grades:
    """The marks of all aspects, and of ``OVERALL``.

    Converted are scores such as ``"7"`` and ``"7/10"``, a mark that is a number alone or has no reason, names in
    another case, lists of one element, and an object around the one that was asked for.

    Raises:
        UnusableAnswer: one is missing, or it is not a number from 0 to 10.
    """
    text = answer.require_text()
    found, names = only_object(text), (*aspects, OVERALL)
    listed = text.startswith("[") and text.endswith("]")
    try:
        marks, converted = {name: Mark.model_validate(found[name]) for name in names}, listed
    except (KeyError, ValidationError):
        marks, converted = {name: _mark(name, value) for name, value in _values(found, names).items()}, True
    marks = {name: mark.model_copy(update={"reason": encodable(mark.reason)}) for name, mark in marks.items()}
    return Grades(marks, json.loads(encodable(json.dumps(found, ensure_ascii=False))), converted)


def _values(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What stands in an answer for each of the names."""
    values = {name: _value(found, name) for name in names}
    if len(found) == 1 and not any(values.values()):
        inner = _alone(next(iter(found.values())))
        if isinstance(inner, dict):
            values = {name: _value(inner, name) for name in names}
    if names == (OVERALL,) and not values[OVERALL] and _value(found, "score"):
        values = {OVERALL: [found]}
    if missing := [name for name, value in values.items() if not value]:
        raise UnusableAnswer(f"the answer lacks {', '.join(missing)}")
    return {name: value[0] for name, value in values.items()}


def _value(found: Mapping[str, Any], name: str) -> list[Any]:
    """The value of a key, in this or else in another case, in a list; an empty one if there is none."""
    if name in found:
        return [found[name]]
    values = [value for key, value in found.items() if _folded(key) == _folded(name)]
    if len(values) > 1:
        raise UnusableAnswer(f"the answer has more than one {name}")
    return values


def _folded(key: str) -> str:
    return _SEPARATORS.sub("_", key.strip().casefold())


def _mark(name: str, value: Any) -> Mark:
    value = _alone(value)
    if isinstance(value, dict):
        fields = {key: _alone(*found) for key in ("reason", "score") if (found := _value(value, key))}
    else:
        fields = {"score": value}
    if fields.get("reason") is None:
        fields["reason"] = ""
    score = fields.get("score")
    if isinstance(score, str) and (written := _NUMBER.fullmatch(score)):
        fields["score"] = float(written[1])
    try:
        return Mark.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join((name, *map(str, first["loc"])))
        raise UnusableAnswer(f"the answer does not fit its schema: {field}: {first['msg']}") from error


def _alone(value: Any) -> Any:
    """The element of a list of one; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
