"""Files that survive kills and power cuts: written atomically, appended to, set aside when damaged."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rflow_jax.errors import InputError
from rflow_jax.utils.output_folder import require_present
from rflow_jax.utils.shown import one_line

SYNC_EVERY = 2.0  # seconds between syncs of a file that lines are appended to


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
    """Writes a file atomically, even if the process is killed or the power fails; it is on disk on return."""
    make_folder(path.parent)
    temporary = temporary_path(path)
    with naming_file(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # it takes space that a full disk has not
            raise
    sync_folder(path.parent)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Gives an OSError within the path of the file that was meant: those of a full disk come without one."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            error.filename, error.filename2 = str(path), None
        raise


def make_folder(path: Path) -> None:
    """Makes a folder and those above it if necessary; their names are on disk on return.

    Raises RunError if this process has claimed a folder above, and that is gone.
    """
    require_present(path)
    missing = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        missing.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on disk, as far as its file system can."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(path: Path) -> None:
    """Puts a file, or a folder with everything in it, on disk; not the name of the path itself."""
    for folder, _, names in os.walk(path):
        for name in names:
            if (file := Path(folder, name)).is_file() and not file.is_symlink():
                _sync(file, os.O_RDONLY)
        sync_folder(Path(folder))
    if path.is_file():
        _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        with naming_file(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def set_aside(path: Path) -> Path:
    """Renames a damaged file to a free name beside it, which is returned."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged{'' if number == 1 else f'-{number}'}")):
        number += 1
    os.rename(path, aside)
    return aside


def set_aside_and_say(path: Path, where: str) -> None:
    """Sets a damaged file aside, and says on stderr where the damage is and that what is missing is done again."""
    aside = set_aside(path)
    said = f"{path}: damaged ({where}); kept as {aside.name}, and what is missing is done again"
    print(one_line(said), file=sys.stderr)


def is_blank(content: bytes) -> bool:
    """Whether a file has no content, or only the zeros that a power cut leaves in its place."""
    return not content.strip(b"\0 \t\r\n")


def inside(folder: Path, name: object) -> Path:
    """The path of a file that another file names, relative to its folder; raises InputError if it leaves the folder."""
    if isinstance(name, str) and name and "\0" not in name and not os.path.isabs(name):
        root = os.path.realpath(folder)
        if os.path.realpath(os.path.join(root, name)).startswith(os.path.join(root, "")):
            return folder / name
    raise InputError(f"{str(name)[:100]!r} is not a file in this folder")


def beneath(folder: Path, name: object) -> Path:
    """As :func:`inside`, by the name alone: in the Hub's cache a model's files are links to another folder."""
    if isinstance(name, str) and name and "\0" not in name and not os.path.isabs(name) and ".." not in name.split("/"):
        return folder / name
    raise InputError(f"{str(name)[:100]!r} is not a file in this folder")


class SyncGroup:
    """Says when lines that were appended to a file should be put on disk: at once, then every :data:`SYNC_EVERY`."""

    def __init__(self) -> None:
        self._last = -SYNC_EVERY

    def due(self) -> bool:
        """Whether it is time; if so, it counts as done."""
        if (now := time.monotonic()) - self._last < SYNC_EVERY:
            return False
        self._last = now
        return True


def append_line(path: Path, line: str, sync: bool = False) -> None:
    """Appends a line, given with its newline; a killed process leaves all of it or its beginning.

    Args:
        sync: put the file on disk, with this line and those before it.
    """
    require_present(path)
    new = sync and not path.exists()
    content = line.encode()
    with naming_file(path), open(path, "ab", buffering=0) as file:  # in one unbuffered call
        if file.write(content) < len(content):  # unbuffered, a full disk is not an error but a short write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if sync:
            os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


def truncate_partial_line(path: Path, torn: bytes) -> None:
    """Removes a partial line from the end of a file."""
    os.truncate(path, path.stat().st_size - len(torn))
