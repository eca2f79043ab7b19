"""Folders that commands write: none in vain, one process at a time, and none that is gone."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from rflow_jax.errors import InputError, RunError
from rflow_jax.utils import cli
from rflow_jax.utils.atomic_io import append_line, write_file
from rflow_jax.utils.output_folder import Claim, usable_folder
from rflow_jax.weights.saving import atomic_output


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _nowhere(path: Path) -> None:
    path.symlink_to("missing/further")


@pytest.mark.parametrize("make", [_fifo, _socket, _loop, _nowhere, Path.touch])
def test_what_is_no_folder_is_refused_and_stays(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x")
    for path in (tmp_path / "x", tmp_path / "x/below"):
        with pytest.raises(InputError, match="/x"), usable_folder(path):
            pass
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["n" * 5000, "a/" * 3000, "nul\0"])
def test_an_impossible_name_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="cannot use this folder"), usable_folder(tmp_path / name):
        pass


def test_folders_that_stay_empty_are_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), usable_folder(tmp_path / "a/b"), Claim(tmp_path / "a/b", ".lock"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with usable_folder(tmp_path / "a/b"):
        (tmp_path / "a/file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def _moved(out: Path) -> None:
    out.rename(out.with_name("moved"))


def _replaced(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()


def _emptied(out: Path) -> None:
    for path in out.iterdir():
        path.unlink()


@pytest.mark.parametrize("lose", [shutil.rmtree, _moved, _replaced, _emptied])
@pytest.mark.parametrize("write", [write_file, append_line, None])
def test_nothing_is_written_in_a_folder_that_is_gone(tmp_path, capsys, lose, write):
    out = tmp_path / "out"
    out.mkdir()

    def main() -> None:
        with Claim(out, ".lock"):
            lose(out)
            if write is not None:
                write(out / "a", "text\n")
            else:
                (out / "sub/b").read_bytes()  # any error that follows from it

    assert cli.run(main) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out}: this folder is gone: ")
    assert said.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


def test_a_run_that_ends_well_in_a_folder_that_is_gone_has_not_ended_well(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RunError, match="is gone"), Claim(out, ".lock"):
        shutil.rmtree(out)


def test_two_that_write_one_output_do_not_meet(tmp_path):
    with atomic_output(tmp_path / "new/model") as partial:
        partial.write_text("first")
        with pytest.raises(InputError, match="another process is writing it"), atomic_output(tmp_path / "new/model"):
            pass
        assert partial.read_text() == "first"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_an_output_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_output(tmp_path / "a/b/model"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(InputError, match=r"^~/runs/a: ~ is written out by the shell alone"),
        usable_folder(Path("~/runs/a")),
    ):
        pass
    assert not list(tmp_path.iterdir())
