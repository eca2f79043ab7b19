"""Every reader meets damaged files: each ends in one line that names the file, or in what is left of it; in bounds.

RFLOW_FUZZ_MUTATIONS=20000 pytest tests/fuzz   (300 by default)
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import traceback
from pathlib import Path

import pytest

from rflow_jax.data.records import RecordError
from rflow_jax.errors import InputError
from rflow_jax.utils.shown import LONGEST, one_line
from tests.fuzz.mutations import mutations
from tests.fuzz.readers import READERS

COUNT = int(os.environ.get("RFLOW_FUZZ_MUTATIONS", "300"))
SECONDS, MEGABYTES = 5, 400  # of one file, and of all files of a reader
SHOWN = 5


@pytest.fixture(autouse=True)
def _bounded_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_one_line_or_skipped(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def too_long(number: int, frame: object) -> None:
        raise TimeoutError(f"over {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    path, read = READERS[name].prepare(tmp_path)
    content, found = path.read_bytes(), []
    read()  # the valid file
    original = {one: one.read_bytes() for one in path.parent.iterdir() if one.is_file()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, damaged in enumerate(mutations(content, READERS[name].form, COUNT, name)):
        for one, kept in original.items():
            if one != path and not one.exists():
                one.write_bytes(kept)
        path.write_bytes(damaged)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read()
        except (InputError, RecordError) as error:
            said = one_line(error)
            if len(said) > LONGEST or not said.isprintable():
                found.append(f"{number}: {said}")
            if str(tmp_path) not in said and "config of" not in name:
                found.append(f"{number}: names no file: {said}")
        except BaseException as error:
            if type(error).__name__ == "TypeCheckError":  # of the tests alone: a whole number where another is meant
                continue
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename}:{where.lineno}"
            found.append(f"{number}: {type(error).__name__}: {str(error)[:100]} ({place}) {damaged[:200]!r}")
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for aside in path.parent.glob("*.damaged*"):
            aside.unlink() if aside.is_file() else shutil.rmtree(aside)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
    assert "Traceback" not in capfd.readouterr().err
    assert not found, "\n".join([f"{len(found)} of {COUNT}", *found[:SHOWN]])
    assert grown < MEGABYTES
