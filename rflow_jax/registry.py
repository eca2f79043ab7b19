"""Parts of a run that are chosen by name: those that come along, and classes of a user's own."""

import importlib
import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

from rflow_jax.errors import InputError

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Accepts a known name, or ``package.module:Class``.

    Raises:
        InputError: it is neither; the nearest known name is suggested.
    """
    known = list(known)
    if name in known or _PATH.fullmatch(name):
        return
    nearest = max(known, key=lambda candidate: SequenceMatcher(None, name.lower(), candidate).ratio())
    raise InputError(
        f"unknown {kind} {name!r}: did you mean {nearest}? known are {', '.join(known)}; "
        f"a class of your own is written package.module:Class"
    )


def require_limits(kind: str, name: str, made: Any, method: str) -> None:
    """Checks what a class of a user's own is asked for before it is asked about anything.

    Args:
        method: what does its work.

    Raises:
        InputError: it lacks a method, its name, or how much it takes at once.
    """
    if not isinstance(getattr(made, "name", None), str):
        raise InputError(f"{kind} {name}: give it a name, a text that stands in the records")
    for limit in ("concurrency", "batch_size"):
        value = getattr(made, limit, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{kind} {name}: its {limit} is {value!r}: give a whole number from 1")
    for needed in (method, "close"):
        if not callable(getattr(made, needed, None)):
            raise InputError(f"{kind} {name}: it has no method {needed}")


def find(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The class behind a name; its module is imported only now.

    Args:
        kind: what is looked for, for messages.
        name: a name in the table, or ``package.module:Class``.
        table: names and where their classes are.

    Raises:
        InputError: the name is unknown, or there is no such module or class.
    """
    check_name(kind, name, table)
    module, _, attribute = table.get(name, name).partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise InputError(f"{kind} {name}: cannot import {module} ({error})") from error
    except AttributeError as error:
        raise InputError(f"{kind} {name}: {module} has no {attribute}") from error
