"""Atomic files, locks, and lines appended safely."""

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
    """Makes a folder if necessary and checks that it is writable, before anything expensive begins.

    Returns:
        Whether it contains anything.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        return any(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot use this folder ({error.strerror})") from error


def try_lock(path: Path) -> IO[bytes] | None:
    """Opens and locks a file, made if necessary; None if this or another process has locked it already.

    The lock ends when the file is closed or the process ends. Raises InputError if it cannot be locked.
    """
    held = open(path, "ab")  # noqa: SIM115
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf's lock ends when any descriptor of the file is closed
        same = os.path.samestat(os.fstat(held.fileno()), path.stat())
    except OSError as error:
        held.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.ENOENT):
            return None
        raise InputError(f"{path}: cannot be locked ({error.strerror}); name a path on another disk") from error
    if not same:  # its owner has just replaced the file
        held.close()
        return None
    return held


def remove_beginnings(folder: Path, name: str | None = None) -> None:
    """Deletes temporary files that killed processes left: of one file in this folder, or of all in it and below.

    Nobody else may be writing there.
    """
    if name is None:
        found = list(folder.rglob(".*.*.tmp"))
    else:
        found = list(folder.glob(f".{glob.escape(name)}.*.tmp"))
        found = [left for left in found if left.name[len(name) + 2 : -4].isdecimal()]  # not of a similar name
    for left in found:
        left.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A temporary name beside a file, which :func:`remove_beginnings` finds.

    It is random and not a process id, which a process in another container or machine may share.
    """
    return path.with_name(f".{path.name}.{secrets.randbits(64)}.tmp")


def write_file(path: Path, content: bytes | str) -> None:
    """Writes a file atomically, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(temporary, path)


def append_line(path: Path, line: str) -> None:
    """Appends a line, given with its newline; a killed process leaves all of it or its beginning."""
    content = line.encode()
    with open(path, "ab", buffering=0) as file:  # in one unbuffered call
        if file.write(content) < len(content):  # unbuffered, a full disk is not an error but a short write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_lines(path: Path) -> tuple[list[str], bytes]:
    """The complete lines of a file without newlines, and the rest; nothing if there is no file."""
    if not path.exists():
        return [], b""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    try:
        return content[:end].decode().split("\n")[:-1], content[end:]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error


def whole_lines(path: Path) -> list[str]:
    """The complete lines of a file without newlines; a partial last line is removed from the file."""
    lines, torn = read_lines(path)
    if torn:
        truncate_partial_line(path, torn)
    return lines


def truncate_partial_line(path: Path, torn: bytes) -> None:
    """Removes a partial line from the end of a file."""
    os.truncate(path, path.stat().st_size - len(torn))
