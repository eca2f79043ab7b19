"""Files that users name and folders hold: only regular ones up to a size are read, so that none can wait or grow."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

from rflow_jax.errors import InputError

LARGEST_TEXT = 2**26  # bytes; the largest text that is read whole is a vocabulary, of a tenth of that
LARGEST_JOURNAL = 2**31  # bytes; a run's own file of lines that is read whole, of a kilobyte an image or step

# What the machine lacks says nothing about the file: these stay an OSError.
OF_THE_MACHINE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE))


def open_regular(path: str | os.PathLike[str], what: str = "file", largest: int | None = None) -> BufferedReader:
    """Opens a file to read its bytes, after the links to it.

    Args:
        what: its name in messages.
        largest: bytes; None for no limit.

    Raises:
        InputError: it is missing, unreadable, larger, or a folder, a pipe or a device.
        OSError: the machine is to blame, for example for too many open files.
    """
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:
        raise InputError(f"{os.fspath(path)!r}: no path has a NUL in it") from error
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        raise InputError(f"{path}: cannot read the {what} ({error.strerror})") from error
    try:
        _require_regular(os.fstat(descriptor), path, what, largest)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_regular(path: str | os.PathLike[str], what: str = "file", largest: int | None = None) -> None:
    """Checks a file that a library is going to open; raises as :func:`open_regular`."""
    open_regular(path, what, largest).close()


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file; False also where nothing can be said, for a name too long for example."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: str | os.PathLike[str], what: str = "file", largest: int = LARGEST_TEXT) -> bytes:
    """The content of a file; raises as :func:`open_regular`."""
    with open_regular(path, what, largest) as file:
        content = file.read(largest + 1)
    if len(content) > largest:  # it grew
        raise InputError(f"{path}: the {what} has more than {largest:,} bytes")
    return content


def read_text(path: str | os.PathLike[str], what: str = "file", largest: int = LARGEST_TEXT) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; raises as :func:`open_regular`."""
    return decode(read_bytes(path, what, largest), path, what)


def decode(content: bytes, source: object, what: str = "file") -> str:
    """A text in UTF-8, without its byte order mark; raises InputError, which begins with ``source``, for anything else.

    Text editors and shells of Windows write UTF-16 where nobody asked for it.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{source}: the {what} is not UTF-8 text but UTF-16; save it as UTF-8")
    if (nul := content.find(b"\0")) >= 0:
        raise InputError(f"{source}: the {what} is not UTF-8 text (byte {nul} is a NUL)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: the {what} is not UTF-8 text (byte {error.start})") from error


def fingerprint_of(path: Path) -> str:
    """A hash of a file's bytes; raises as :func:`open_regular`."""
    return sha256_of(path)[:16]


def sha256_of(path: Path, what: str = "file") -> str:
    """The SHA-256 of a file's bytes; raises as :func:`open_regular`."""
    with open_regular(path, what) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_regular(found: os.stat_result, path: object, what: str, largest: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path}: a folder, where the {what} is expected")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: a pipe, socket or device, where the {what} is expected")
    if largest is not None and found.st_size > largest:
        raise InputError(f"{path}: the {what} has {found.st_size:,} bytes; {largest:,} are read at most")
