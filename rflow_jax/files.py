"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from rflow_jax.errors import InputError


def use_folder(path: Path) -> bool:
    """Makes a folder if need be, and tries whether it can be written to, before anything expensive begins.

    Returns:
        Whether it holds anything.

    Raises:
        InputError: it cannot be made, or cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        return any(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot use this folder ({error.strerror})") from error


def remove_beginnings(folder: Path, name: str = "*") -> None:
    """Deletes what killed processes left of files in this folder and below; nobody else may be writing there."""
    for left in folder.rglob(f".{name}.*.tmp"):
        left.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file that is there whole or not at all, also if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)


def append_line(path: Path, line: str) -> None:
    """Adds a line, given with its end, to a file; a killed process leaves all of it or its beginning."""
    content = line.encode()
    with open(path, "ab", buffering=0) as file:  # in one call, and without a buffer of our own
        if file.write(content) < len(content):  # without a buffer a full disk is no error, but a line cut short
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def whole_lines(path: Path) -> list[str]:
    """The lines of a file without their ends; the file is cut behind the last whole one.

    Raises:
        InputError: it is no text.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = whole.decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return lines
