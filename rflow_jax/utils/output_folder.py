"""The folder that a command writes: checked before anything expensive begins, held by one process, and watched."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from rflow_jax.errors import InputError, RunError

LOCK = ".lock"  # the file that is locked in a folder of one process
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


@contextmanager
def usable_folder(path: Path) -> Iterator[None]:
    """Makes a folder if necessary, and checks that it is writable; on leaving, what it made and is empty is removed.

    Raises:
        InputError: it cannot be made or written to.
    """
    new = [one for one in (path, *path.parents) if not os.path.lexists(one)]
    if path.parts and path.parts[0].startswith("~") and Path(path.parts[0]) in new:
        raise InputError(f"{path}: ~ is written out by the shell alone, before a word; give the whole path")
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except FileExistsError as error:
            raise InputError(
                f"{path}: a file, a pipe, a device or a broken link is in the place of this folder; name another"
            ) from error
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # it says nothing about the path
            raise InputError(f"{path}: cannot use this folder ({getattr(error, 'strerror', error)})") from error
        yield
    finally:
        for one in new:
            try:
                one.rmdir()
            except (OSError, ValueError):  # it is not empty, or was never made
                break


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


class Claim:
    """A folder that is this process's until the claim is closed or the process ends; a context manager.

    While it is held, nothing is written in a folder that is gone (:func:`require_present`), and an error that follows
    from that becomes the one that says so.

    Args:
        lock: name of the file in the folder that is locked; processes with different ones share the folder.

    Raises:
        InputError: another process has this claim, or the disk has no locks.
    """

    def __init__(self, folder: Path, lock: str = LOCK) -> None:
        self.folder, self._lock = folder, folder / lock
        held = try_lock(self._lock)
        if held is None:
            raise InputError(f"{folder}: another process is using this folder; wait for it, or give another")
        self._held = held
        _claims.append(self)

    def is_present(self) -> bool:
        """Whether the folder is still where it was, with its lock in it."""
        try:
            return os.path.samestat(os.fstat(self._held.fileno()), os.stat(self._lock))
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise

    def require_present(self) -> None:
        """Raises RunError if the folder is gone."""
        if not self.is_present():
            raise RunError(
                f"{self.folder}: this folder is gone: it was deleted, moved or emptied while it was being written to; "
                "nothing more is written. If it was moved, the same command with its new path goes on"
            )

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or isinstance(error, Exception):
                self.require_present()
        finally:
            self.close()

    def close(self) -> None:
        """Releases the claim."""
        if self not in _claims:
            return
        _claims.remove(self)
        if self.is_present():
            self._lock.unlink(missing_ok=True)  # while it is locked: it must not be another's by then
        self._held.close()


_claims: list[Claim] = []


def require_present(path: Path) -> None:
    """Raises RunError if a path lies in a folder that this process has claimed and that is gone.

    Otherwise the folders above a new file would be made once more.
    """
    for claim in _claims:
        if path.is_relative_to(claim.folder):
            claim.require_present()
