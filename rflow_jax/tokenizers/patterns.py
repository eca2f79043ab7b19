"""The patterns of a ``tokenizer.json``, which the tokenizers library matches for as long as it takes.

Nothing stops that library once it is at work. What backtracks without end has choices within repetitions, or many in
a row; no published tokenizer does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from re import _constants as parts  # pyright: ignore[reportAttributeAccessIssue] (missing in the type stubs)
from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from rflow_jax.errors import InputError

_LONGEST = 2000  # letters; the longest published pattern has 400
_MOST_REPEATS = 64  # that a bounded repetition may ask for
_MOST_CHOICES = 9  # in a row; each may multiply the time, repetitions by the length of the text
_MOST_GROWTH = 1000  # letters that all replacements together may make of one
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_REPEATS = (parts.MAX_REPEAT, parts.MIN_REPEAT, parts.POSSESSIVE_REPEAT)
_CLASS = re.compile(r"\\[pP](?:\{\^?\w+\}|\w)|\[:\^?\w+:\]|\\[hHRXG]")  # of Oniguruma; any class serves to count


def require_bounded(tokenizer: dict[str, Any], path: Path) -> None:
    """Raises InputError for a pattern that may not end, or replacements that may grow without bound.

    Args:
        tokenizer: the content of the file.
        path: its name, for messages.
    """
    growth = 1
    for step in _objects([tokenizer.get(name) for name in _STEPS]):
        if isinstance(pattern := step.get("Regex"), str) and (wrong := _fault(pattern)):
            raise InputError(f"{path}: the pattern {pattern[:60]!r} {wrong}; take the tokenizer that was published")
        if step.get("type") in ("Replace", "Prepend"):
            growth *= max(1, len(str(step.get("content") or step.get("prepend") or "")))
    if growth > _MOST_GROWTH:
        raise InputError(f"{path}: its replacements make too long a text of a short one; take another tokenizer")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within a value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _objects(one)


def _fault(pattern: str) -> str:
    """Why a pattern may not end; empty if it does."""
    if len(pattern) > _LONGEST:
        return f"has {len(pattern):,} letters; {_LONGEST:,} are read at most"
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = parser.parse(_CLASS.sub(r"\\w", pattern))
        if (choices := _choices(tree, within=False)) > _MOST_CHOICES:
            return f"has {choices} choices in a row; {_MOST_CHOICES} are taken at most"
    except _Endless as error:
        return str(error)
    except (re.error, OverflowError, RecursionError) as error:
        return f"cannot be checked ({error})"
    return ""


class _Endless(Exception):
    """Why a pattern may not end."""


def _choices(tree: Any, within: bool) -> int:
    """The choices that matching a parsed pattern makes one after the other: a repetition counts as two.

    Args:
        within: it lies in a repetition, in which choices multiply without bound.
    """
    count = 0
    for kind, value in tree:
        inside = within
        if kind in _REPEATS:
            least, most = value[:2]
            if max(least, 0 if most is parts.MAXREPEAT else most) > _MOST_REPEATS:
                raise _Endless(f"repeats more than {_MOST_REPEATS} times")
            inside = within or most != 1
            count += 0 if least == most else 1 + inside
        elif kind is parts.BRANCH:
            count += 1
        elif kind in (parts.GROUPREF, parts.GROUPREF_EXISTS):
            raise _Endless("refers back to a group")
        if within and count:
            raise _Endless("has a choice or a repetition within a repetition")
        inner = [_choices(part, inside) for part in _parts(value)]
        count += max(inner, default=0) if kind is parts.BRANCH else sum(inner)
    return count


def _parts(value: Any) -> Iterator[Any]:
    """The patterns within one part of a parsed pattern."""
    if isinstance(value, parser.SubPattern):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _parts(one)
