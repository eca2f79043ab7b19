"""Files of JSON lines: one record a line, and errors that name the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rflow_jax.data.records import RecordError
from rflow_jax.errors import InputError


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, the object of that line) for every line that is not empty.

    Raises:
        InputError: the file cannot be read, a line is no JSON object, or there is none.
    """
    try:
        # Texts may hold what str.splitlines takes for the end of a line, too.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot read this file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not in UTF-8") from error
    if not any(line.strip() for line in lines):
        raise InputError(f"{path}: holds no line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object, but {line.strip()[:40]!r}")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half of a character ({error.object[error.start]!r})") from error
    return record


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """A text of a record; raises InputError where it is missing or none."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is {value!r}: give a text")
    return value


def fingerprint_of(path: Path) -> str:
    """A hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_image(path: Path, where: str) -> bytes:
    """The bytes of a picture that a line names; raises RecordError where there are none."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise RecordError(f"{where}: {path}: cannot read this picture ({error})") from error
