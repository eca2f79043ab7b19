"""Settings that a user gives as plain keys and values, such as ``verifier.options``, read into their dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from rflow_jax.errors import InputError

Config = TypeVar("Config")


def read_options(kind: type[Config], given: Mapping[str, Any], where: str) -> Config:
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


def refuse_set(config: Any, instead: Mapping[str, str]) -> None:
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
