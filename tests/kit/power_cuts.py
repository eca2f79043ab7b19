"""What a disk holds after a power cut: only what was synced, or names without their content."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Watches the syncs below a folder, and keeps a state of the disk from just before some of them.

    Args:
        every: how many syncs there are from one kept state to the next.
    """

    def __init__(self, root: Path, states: Path, every: int = 1) -> None:
        self._root, self._states, self._every = root, states, every
        self._content: dict[int, bytes] = {}  # inode -> what was synced last
        self._names: dict[int, dict[str, int]] = {}  # inode of a folder -> its synced names
        self.syncs = 0
        self.states: list[Path] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on."""
        sync: Callable[[int], Any] = os.fsync

        def fsync(descriptor: int) -> None:
            sync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path == self._root or self._root in path.parents:
                self._keep()
                self._synced(path, os.fstat(descriptor))

        monkeypatch.setattr(os, "fsync", fsync)

    def _synced(self, path: Path, found: os.stat_result) -> None:
        if stat.S_ISDIR(found.st_mode):
            self._names[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._content[found.st_ino] = path.read_bytes()

    def _keep(self) -> None:
        self.syncs += 1
        if self.syncs % self._every == 0:
            for only_synced in (True, False):
                state = self._states / f"{self.syncs}-{'synced' if only_synced else 'named'}"
                self.copy(self._root, state, only_synced)
                self.states.append(state)

    def copy(self, folder: Path, state: Path, only_synced: bool) -> None:
        """Names that were not synced are lost, or all are kept; content that was not synced is lost."""
        state.mkdir(parents=True)
        kept = self._names.get(folder.stat().st_ino, {})
        for entry in list(os.scandir(folder)):
            if only_synced and kept.get(entry.name) != entry.inode():
                continue
            target = state / entry.name
            if entry.is_dir():
                self.copy(Path(entry.path), target, only_synced)
                continue
            content, durable = Path(entry.path).read_bytes(), self._content.get(entry.inode(), b"")
            if not content.startswith(durable):  # of an earlier file with this inode
                durable = b""
            target.write_bytes(durable)
