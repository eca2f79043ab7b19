"""Reads and checks JSON and JSON lines, with errors that name file, line and key."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from rflow_jax.errors import InputError
from rflow_jax.utils.checks import require_text
from rflow_jax.utils.file_kinds import stand_in


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError if it is missing, does not parse or is not one."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected an object with keys")
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises InputError where it is missing or does not parse."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a whole folder of such a model") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        what = stand_in(path) or f"cannot be read as JSON ({error})"
        raise InputError(f"{path}: {what}") from error


def check_types(config: type, content: Mapping[str, Any], path: Path) -> None:
    """Raises InputError for a key of ``content`` of another type than that field of the dataclass ``config``.

    Nested configurations are not checked: they have their own files, or parts of a file.
    """
    for key, kind in get_type_hints(config).items():
        if kind not in _IS or key not in content or (content[key] is None and key in _MAY_BE_NULL):
            continue
        value = content[key]
        if key == "sample_size" and isinstance(value, list):
            kind = tuple[int, ...]  # height and width
        if not _IS[kind](key, value):
            expected = _EXPECTED[kind].replace("above 0", "from 0") if key in _MAY_BE_ZERO else _EXPECTED[kind]
            raise InputError(f"{path}: {key} is {value!r}; expected {expected}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prefixes an InputError raised within by the file's path."""
    try:
        yield
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error


_MAY_BE_NULL = ("shift_factor",)
_MAY_BE_ZERO = ("num_layers", "num_single_layers", "eos_token_id", "fullatt_block_indexes")
_EXPECTED = {
    bool: "true or false",
    str: "a text",
    int: "a whole number above 0",
    float: "a number",
    tuple[int, ...]: "a list of whole numbers above 0",
}


def _is_count(key: str, value: Any) -> bool:
    return type(value) is int and value >= (0 if key in _MAY_BE_ZERO else 1)


_IS: dict[Any, Callable[[str, Any], bool]] = {
    bool: lambda key, value: type(value) is bool,
    str: lambda key, value: type(value) is str,
    int: _is_count,
    float: lambda key, value: type(value) in (int, float) and math.isfinite(value),
    tuple[int, ...]: lambda key, value: (
        type(value) is list and value != [] and all(_is_count(key, each) for each in value)
    ),
}


def read_text(path: Path, what: str) -> str:
    """The text of a file; raises InputError, which calls the file ``what``, if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: the {what} is not UTF-8 text") from error


def read_json_lines(path: Path, what: str, example: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """As :func:`parse_json_lines`, of a file that a user wrote: it has lines, and nothing that UTF-8 cannot represent.

    Raises:
        InputError: the file cannot be read or is empty, or a line is not such an object.
    """
    empty = True
    for source, record in parse_json_lines(read_text(path, what), path, example):
        require_text(json.dumps(record, ensure_ascii=False), source)
        empty = False
        yield source, record
    if empty:
        raise InputError(f"{path}: the {what} is empty")


def parse_json_lines(text: str, path: Path, example: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, the object of that line) for every line of ``text`` that is not empty.

    Args:
        path: of the file, for the error.
        example: of a line, for the error.

    Raises:
        InputError: a line is not a JSON object.
    """
    # Not str.splitlines, which also splits at characters that texts may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield (source := f"{path}:{number}"), parse_json_line(line, source, example)


def parse_json_line(line: str, source: str, example: str = "") -> dict[str, Any]:
    """The object on a line; raises InputError, which begins with ``source``, if there is none."""
    such = f" such as {example}" if example else ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not a JSON object{such} ({getattr(error, 'msg', error)})") from error
    if not isinstance(record, dict):
        raise InputError(f"{source}: not a JSON object{such}, but {line.strip()[:40]!r}")
    return record


def text_of(record: dict[str, Any], key: str, source: str) -> str:
    """A text of a record; raises InputError if it is missing, blank or not a string."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{source}: {key} is {value!r}: give a text")
    return value


def fingerprint_of(path: Path) -> str:
    """A hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
