"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


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
