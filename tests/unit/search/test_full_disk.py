"""A disk that is full at any write: one line names the file, and the same command goes on when there is space again."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rflow_jax.utils import atomic_io, cli
from rflow_jax.utils.atomic_io import append_line, write_file
from tests.kit.searching import drive, models, prompt_run
from tests.unit.search.test_power_cuts import content, finish


class FullDisk:
    """Fails at the write of this number, and at all later ones, with half of the bytes written."""

    def __init__(self, at: int) -> None:
        self.writes, self._at = 0, at

    def fill(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def opened(path: Path, mode: str, buffering: int = -1):
            file = open(path, mode, buffering=buffering)  # noqa: SIM115
            if "w" in mode or "a" in mode:
                return _File(file, self)
            return file

        sync = os.fsync

        def fsync(descriptor: int) -> None:
            self.step()
            sync(descriptor)

        monkeypatch.setattr(atomic_io, "open", opened, raising=False)
        monkeypatch.setattr(os, "fsync", fsync)

    def step(self) -> None:
        self.writes += 1
        if self.writes > self._at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _File:
    def __init__(self, file, disk: FullDisk) -> None:
        self._file, self._disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, content: bytes) -> int:
        try:
            self._disk.step()
        except OSError:
            self._file.write(content[: len(content) // 2])
            raise
        return self._file.write(content)


def test_a_search_whose_disk_was_full_at_any_write_goes_on(tmp_path, monkeypatch, capsys):
    finish(tmp_path / "whole")
    whole = content(tmp_path / "whole")
    counted = FullDisk(10**9)
    with monkeypatch.context() as patched:
        counted.fill(patched)
        finish(tmp_path / "counted")
    assert counted.writes > 60
    for at in range(0, counted.writes, 7):
        out = tmp_path / str(at)
        with monkeypatch.context() as patched:
            FullDisk(at).fill(patched)
            status = cli.run(lambda out=out: drive(prompt_run(out), models(), random.Random(1)) and 0)
        said = capsys.readouterr().err
        assert (status, said.count("\n")) == (1, 1), said
        assert str(tmp_path) in said
        assert "the disk is full" in said
        finish(out)
        assert content(out) == whole, at
        capsys.readouterr()


@pytest.mark.parametrize("write", [write_file, append_line])
def test_a_full_disk_is_named_with_its_file_and_leaves_no_beginning(tmp_path, monkeypatch, capsys, write: Callable):
    path = tmp_path / "a.json"
    path.write_text("before\n")
    FullDisk(0).fill(monkeypatch)
    assert cli.run(lambda: write(path, "now, and longer\n")) == 1
    assert capsys.readouterr().err == f"error: {path}: the disk is full; free some space or choose another path\n"
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text().startswith("before\n")


def test_other_things_that_the_machine_lacks_are_one_line(capsys):
    def too_many() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/x")

    def no_memory() -> None:
        raise MemoryError

    def no_device_memory() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    for failing in (too_many, no_memory, no_device_memory):
        assert cli.run(failing) == 1
        assert capsys.readouterr().err.count("\n") == 1
