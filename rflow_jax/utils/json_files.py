"""Reads and checks JSON and JSON lines, with errors that name file, line and key.

Both are read strictly, so that every program reads the same from them: UTF-8, no key twice, no NaN, bounded numbers and
nesting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from rflow_jax.errors import InputError
from rflow_jax.utils.checks import require_text
from rflow_jax.utils.file_kinds import stand_in
from rflow_jax.utils.files import LARGEST_TEXT, decode, open_regular, read_bytes

DEEPEST = 100  # brackets within brackets; programs that walk a value recursively bear some hundreds
LONGEST_NUMBER = 100  # digits; of more than 308 there is no float
LONGEST_LINE = 2**24  # bytes; a long conversation has some thousands
LARGEST_LIST = 2**33  # bytes of a file of lines, which are read one by one


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError if it is missing, does not parse or is not one."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected an object with keys")
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises InputError where it is missing or does not parse."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give a whole folder of such a model")
    content = read_bytes(path, "JSON file")
    try:
        return parse_json(content, str(path))
    except InputError as error:
        if what := stand_in(path):
            raise InputError(f"{path}: {what}") from error
        raise


def parse_json(text: str | bytes, source: str, *, largest: int = LARGEST_TEXT) -> Any:
    """The value of a JSON text.

    Args:
        source: the file, which begins messages.
        largest: characters or bytes.

    Raises:
        InputError: it is none, or not as strict as this module reads; says on which line.
    """
    if len(text) > largest:
        raise InputError(f"{source}: has {len(text):,} characters; {largest:,} are read at most")
    text = decode(text, source) if isinstance(text, bytes) else text
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}:{error.lineno}: cannot be read as JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: cannot be read as JSON ({_reason(error)})") from error


def _loads(text: str, *, nan: bool = False) -> Any:
    """Raises ValueError or RecursionError."""
    found = json.loads(
        text,
        parse_int=_int,
        parse_float=float if nan else _float,
        parse_constant=float if nan else _no_constant,
        object_pairs_hook=_object,
    )
    # Few brackets cannot be nested deeply; most texts need no second look.
    if text.count("[") + text.count("{") > DEEPEST and _deeper(found):
        raise ValueError(f"nested more than {DEEPEST} deep")
    return found


def _int(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits; {LONGEST_NUMBER} are read at most")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := key_given_twice(pairs)) is not None:
        raise ValueError(f"the key {twice[:40]!r} stands there twice")
    return dict(pairs)


def key_given_twice(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key of an object that an earlier pair has too; None if there is none."""
    if len(dict(pairs)) == len(pairs):
        return None
    seen: set[str] = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))


def _deeper(value: Any) -> bool:
    """Whether containers are nested more than :data:`DEEPEST` deep."""
    level = [value]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for members in inner for one in members]
    return any(isinstance(one, dict | list) for one in level)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested more than {DEEPEST} deep"
    return str(getattr(error, "msg", error))


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


def read_json_lines(path: Path, what: str, example: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, the object of that line), of a file that a user wrote.

    Args:
        what: the file's name in messages.
        example: of a line, for the error.

    Raises:
        InputError: the file cannot be read or is empty, or a line is not such an object, or has what UTF-8 has not.
    """
    empty = True
    for source, record in read_records(path, what, example):
        require_text(json.dumps(record, ensure_ascii=False), source)
        empty = False
        yield source, record
    if empty:
        raise InputError(f"{path}: the {what} is empty")


def read_records(path: Path, what: str, example: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """As :func:`read_json_lines`, of a file that a program wrote: it may be empty, and hold halves of characters."""
    with open_regular(path, what, LARGEST_LIST) as file:
        number = 0
        # Not str.splitlines, which also splits at characters that texts may contain.
        while line := file.readline(LONGEST_LINE + 1):
            source = f"{path}:{(number := number + 1)}"
            if len(line) > LONGEST_LINE:
                raise InputError(f"{source}: the line has more than {LONGEST_LINE:,} bytes")
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise InputError(f"{path}: the {what} is not UTF-8 text but UTF-16; save it as UTF-8")
            text = decode(line, source, what)
            if text.strip():
                yield source, parse_json_line(text, source, example)


def parse_json_lines(text: str, path: Path, example: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, the object of that line) for every line of ``text`` that is not empty; raises InputError."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield (source := f"{path}:{number}"), parse_json_line(line, source, example)


def parse_json_line(line: str | bytes, source: str, example: str = "", *, nan: bool = False) -> dict[str, Any]:
    """The object on a line.

    Args:
        source: file and line, which begin messages.
        example: of a line, for the error.
        nan: numbers may be NaN or infinite, as Python writes them.

    Raises:
        InputError: there is none.
    """
    such = f" such as {example}" if example else ""
    if len(line) > LONGEST_LINE:
        raise InputError(f"{source}: the line has more than {LONGEST_LINE:,} bytes")
    text = decode(line, source) if isinstance(line, bytes) else line
    try:
        record = _loads(text, nan=nan)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not a JSON object{such} ({_reason(error)})") from error
    if not isinstance(record, dict):
        raise InputError(f"{source}: not a JSON object{such}, but {text.strip()[:40]!r}")
    return record


def text_of(record: dict[str, Any], key: str, source: str) -> str:
    """A text of a record; raises InputError if it is missing, blank or not a string."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{source}: {key} is {value!r}: give a text")
    return value
