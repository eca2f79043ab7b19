"""Parts of a run that are chosen by name: those that come along, and classes of a user's own."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import SequenceMatcher, get_close_matches
from typing import Any, TypeVar, get_type_hints

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


def load_class(kind: str, name: str, table: Mapping[str, str]) -> Any:
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


Config = TypeVar("Config")


def parse_options(kind: type[Config], given: Mapping[str, Any], where: str) -> Config:
    """The dataclass ``kind`` with these fields.

    Args:
        where: what an error begins with.

    Raises:
        InputError: a key that is no field (one like it is named, else all), a value of another type, a field that is
            missing, or what the dataclass itself refuses.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    values = dict(given)
    for key, value in given.items():
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key}: {hint}")
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = key + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
            # Texts, and what holds them, may be addresses with passwords.
            given_as = f" is {value!r}" if value is None or isinstance(value, (bool, int, float)) else ""
            raise InputError(f"{where}: {place}{given_as}: {first['msg']}") from error
    try:
        return kind(**values)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from error


def check_unused(config: Any, instead: Mapping[str, str]) -> None:
    """Refuses settings that a model without an endpoint would silently ignore.

    Args:
        config: the section of a model, with its ``name``.
        instead: fields that must be at their defaults, and what to do otherwise.

    Raises:
        InputError: one of them is set; says what to do.
    """
    for field in fields(config):
        if field.name in instead and getattr(config, field.name) != field.default:
            raise InputError(f"{field.name}: {config.name} asks no endpoint and ignores it: {instead[field.name]}")
