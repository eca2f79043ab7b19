"""Files that are there whole or not at all."""

from __future__ import annotations

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
