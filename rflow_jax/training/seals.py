"""Sums of the files of checkpoints: damage must not be read as numbers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import jax

from rflow_jax.files import write_file

_BLOCK = 1 << 24  # bytes


class Seal(NamedTuple):
    """What the sums of a checkpoint's files say.

    Attributes:
        whole: all files are as they were written; False also where there are no sums.
        broken: what is not as it was; empty where nothing is known to be.
    """

    whole: bool
    broken: str


class Seals:
    """The sums of a run's checkpoints, a file of JSON for each; the first process alone writes them.

    Args:
        folder: of the sums.
        checkpoints: whose folders are named by their steps.
    """

    def __init__(self, folder: Path, checkpoints: Path):
        self._folder, self._checkpoints = folder, checkpoints
        self._thread = ThreadPoolExecutor(1, "seal")
        self._pending: Future[None] | None = None

    def begin(self, steps: Sequence[int]) -> None:
        """Begins to sum these checkpoints, which are whole; in a thread, since a large state takes minutes to read."""
        self.wait()
        if jax.process_index() == 0:
            self._pending = self._thread.submit(self._write, list(steps))

    def wait(self) -> None:
        """Returns when all that was begun is written; raises what went wrong meanwhile."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def read(self, step: int) -> Seal:
        """Reads a checkpoint's files and compares."""
        file = self._file(step)
        if not file.exists():  # the newest of a killed run: it is whole, but not yet summed
            return Seal(False, "")
        try:
            noted = json.loads(file.read_text())
        except ValueError:  # these are damaged; of the checkpoint that says nothing
            return Seal(False, "")
        found = _sums(self._checkpoints / str(step))
        wrong = sorted(name for name in noted if noted[name] != found.get(name))
        return Seal(not wrong, f"{wrong[0]} is not as it was written" if wrong else "")

    def remove(self, step: int) -> None:
        """Deletes the sums of a checkpoint."""
        self._file(step).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"{step}.json"

    def _write(self, steps: Sequence[int]) -> None:
        for step in steps:
            if not self._file(step).exists():
                with suppress(FileNotFoundError):  # it is just being removed, since newer ones are there
                    write_file(self._file(step), json.dumps(_sums(self._checkpoints / str(step))))
        for file in self._folder.glob("*.json"):
            if not (self._checkpoints / file.stem).exists():
                file.unlink()


def _sums(folder: Path) -> dict[str, int]:
    """File -> checksum."""
    return {str(file.relative_to(folder)): _sum(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _sum(file: Path) -> int:
    total = 0
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            total = zlib.crc32(block, total)
    return total
