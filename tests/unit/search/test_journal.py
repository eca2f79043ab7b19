"""The journal of a prompt: whatever was noted is known again, up to where a kill cut it."""

import errno
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.search.prompt_folder import Journal, json_line

texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(["a\u2028b", "\x85", "\n", "\x1c\x0b"])
verdicts = st.fixed_dictionaries({"score": st.none() | st.integers(0, 9), "explanation": texts})
notes = st.lists(
    st.tuples(st.integers(0, 4), st.just("verdict"), verdicts)
    | st.tuples(st.integers(0, 4), st.just("reflection"), st.fixed_dictionaries({"text": texts})),
    max_size=8,
)


def known(journal: Journal) -> dict[tuple[int, str], object]:
    found = {(p, what): journal.known(p, what) for p in range(5) for what in ("verdict", "reflection")}
    return {key: value for key, value in found.items() if value is not None}


@given(notes, st.data())
def test_a_journal_cut_at_any_byte_knows_what_stands_in_whole_lines_and_goes_on(entries, data):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "j.jsonl"
        journal = Journal(path)
        for entry in entries:
            journal.note(*entry)
        whole = {(position, what): value for position, what, value in entries}
        assert known(Journal(path)) == known(journal) == whole
        content = path.read_bytes() if entries else b""
        cut = content[: data.draw(st.integers(0, len(content)))]
        path.write_bytes(cut)
        kept = entries[: cut.count(b"\n")]
        again = Journal(path)
        assert known(again) == {(position, what): value for position, what, value in kept}
        again.note(4, "verdict", {"score": 1})
        assert known(Journal(path)) == known(again)
        assert known(again)[4, "verdict"] == {"score": 1}


def test_there_is_no_file_before_the_first_line_and_none_after_it_is_removed(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.remove()
    assert not list(tmp_path.iterdir())
    journal.note(0, "verdict", {})
    journal.remove()
    assert not list(tmp_path.iterdir())


def test_a_line_is_one_line_and_readable_in_any_script():
    line = json_line({"text": "zwei Käuze\nund\u2028mehr"})
    assert line.count("\n") == 1
    assert "Käuze" in line
    assert json.loads(line) == {"text": "zwei Käuze\nund\u2028mehr"}


def test_a_disk_that_takes_half_a_line_is_an_error(tmp_path, monkeypatch):
    """A file without a buffer writes what fits and says how much that was."""
    full = os.open("/dev/null", os.O_WRONLY)

    class Half:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, line):
            return os.write(full, line[:3])

    journal = Journal(tmp_path / "j")
    monkeypatch.setattr("builtins.open", lambda *_, **__: Half())
    with pytest.raises(OSError, match="No space left") as caught:
        journal.note(0, "verdict", {"score": 1})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "j"))
    assert journal.known(0, "verdict") is None
    os.close(full)
