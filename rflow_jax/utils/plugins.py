"""Components chosen by name: built-in ones, and the user's own classes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from rflow_jax.errors import InputError
from rflow_jax.utils.checks import nearest, suggestion

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises InputError, suggesting the nearest name, unless a name is known or ``package.module:Class``."""
    known = list(known)
    if name not in known and not _PATH.fullmatch(name):
        raise InputError(
            f"unknown {kind} {name!r}: did you mean {nearest(name.lower(), known)}? known are {', '.join(known)}; "
            f"a class of your own is written package.module:Class"
        )


def require_limits(kind: str, name: str, made: Any, method: str) -> None:
    """Raises InputError if an instance of a user's class lacks a name, its limits, or a method."""
    if not isinstance(getattr(made, "name", None), str):
        raise InputError(f"{kind} {name}: give it a name, a string for the records")
    for limit in ("concurrency", "batch_size"):
        value = getattr(made, limit, None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{kind} {name}: its {limit} is {value!r}: give a whole number from 1")
    for needed in (method, "close"):
        if not callable(getattr(made, needed, None)):
            raise InputError(f"{kind} {name}: it has no method {needed}")


def load_class(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """Imports the class of a name in ``table``, or of ``package.module:Class``.

    Args:
        kind: what the class is, for messages.
        name: a key of the table, or ``package.module:Class``.
        table: names and the import paths of their classes.

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


def parse_options(kind: type[Config], given: Mapping[str, Any], source: str) -> Config:
    """The dataclass ``kind`` with these fields; errors begin with ``source``.

    Raises:
        InputError: an unknown key, a value of another type, a missing field, or what the dataclass itself refuses.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    values = dict(given)
    for key, value in given.items():
        if key not in known:
            raise InputError(f"{source}: unknown key {key}: {suggestion(str(key), known)}")
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            path = key + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
            # Strings and containers are not repeated: they may be addresses with passwords.
            given_as = f" is {value!r}" if value is None or isinstance(value, (bool, int, float)) else ""
            raise InputError(f"{source}: {path}{given_as}: {first['msg']}") from error
    try:
        return kind(**values)
    except (InputError, TypeError) as error:
        raise InputError(f"{source}: {error}") from error


def check_unused(config: Any, instead: Mapping[str, str]) -> None:
    """Raises InputError for settings that a model without an endpoint would silently ignore.

    Args:
        config: the section of a model, with its ``name``.
        instead: fields that must be at their defaults, and what to do otherwise.
    """
    for field in fields(config):
        if field.name in instead and getattr(config, field.name) != field.default:
            raise InputError(f"{field.name}: {config.name} asks no endpoint and ignores it: {instead[field.name]}")
