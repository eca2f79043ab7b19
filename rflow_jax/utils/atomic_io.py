"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import tempfile
from pathlib import Path
from typing import IO

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


def try_lock(path: Path) -> IO[bytes] | None:
    """A file, made if need be, open and locked; None if another process, or another place in this one, holds it.

    It is free again when what is returned is closed, or the process ends, however it ends.

    Raises:
        InputError: it cannot be locked.
    """
    held = open(path, "ab")  # noqa: SIM115
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf's ends when any descriptor of the file is closed
        same = os.path.samestat(os.fstat(held.fileno()), path.stat())
    except OSError as error:
        held.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.ENOENT):
            return None
        raise InputError(f"{path}: cannot be locked ({error.strerror}); name a place on another disk") from error
    if not same:  # its holder has just put another in its place
        held.close()
        return None
    return held


def remove_beginnings(folder: Path, name: str | None = None) -> None:
    """Deletes what killed processes left of a file in this folder, or of all in it and below.

    Nobody else may be writing there.
    """
    if name is None:
        found = list(folder.rglob(".*.*.tmp"))
    else:
        found = list(folder.glob(f".{glob.escape(name)}.*.tmp"))
        found = [left for left in found if left.name[len(name) + 2 : -4].isdecimal()]  # not of one named alike
    for left in found:
        left.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A name beside a file under which it can be written; :func:`remove_beginnings` finds it.

    Not by the process's number, which one in another container, or on another machine, may have as well.
    """
    return path.with_name(f".{path.name}.{secrets.randbits(64)}.tmp")


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file that is there whole or not at all, also if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)


def append_line(path: Path, line: str) -> None:
    """Adds a line, given with its end, to a file; a killed process leaves all of it or its beginning."""
    content = line.encode()
    with open(path, "ab", buffering=0) as file:  # in one call, and without a buffer of our own
        if file.write(content) < len(content):  # without a buffer a full disk is no error, but a line cut short
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_lines(path: Path) -> tuple[list[str], bytes]:
    """The whole lines of a file without their ends, and what stands behind the last; nothing if there is no file.

    Raises:
        InputError: it is no text.
    """
    if not path.exists():
        return [], b""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    try:
        return content[:end].decode().split("\n")[:-1], content[end:]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error


def whole_lines(path: Path) -> list[str]:
    """The lines of a file without their ends; the file is cut behind the last whole one.

    Raises:
        InputError: it is no text.
    """
    lines, torn = read_lines(path)
    if torn:
        truncate_partial_line(path, torn)
    return lines


def truncate_partial_line(path: Path, torn: bytes) -> None:
    """Takes the beginning of a line off the end of a file."""
    os.truncate(path, path.stat().st_size - len(torn))
