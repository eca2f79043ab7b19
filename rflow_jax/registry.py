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
