"""The folder of a prompt."""

import json
import os
import random
import re

import PIL.Image
import pytest

from rflow_jax.errors import InputError
from rflow_jax.search import prompt_folder as store
from rflow_jax.search.prompt_folder import (
    JOURNAL,
    PromptFolder,
    check_entry,
    finished_records,
    link,
    read_image,
    read_records,
)
from rflow_jax.testing.openai_server import score_of
from rflow_jax.utils.atomic_io import remove_beginnings, temporary_path
from tests.kit.searching import drive, files, models, prompt_run

IMAGE = PIL.Image.new("RGB", (4, 4), "red")


@pytest.fixture
def searched(tmp_path):
    drive(prompt_run(tmp_path), models(), random.Random(0))
    return tmp_path / "00005"


def test_folders_hold_what_their_names_say(searched):
    records = read_records(searched)
    content = {f.name: [i.read_bytes() for i in sorted(f.iterdir())] for f in searched.iterdir() if f.is_dir()}
    images = [(searched / record["file"]).read_bytes() for record in records]
    assert sorted(content["midimg"]) == sorted(images)
    assert content["samples"] == images[:4]
    assert content["samples_lastround"] == images[-2:]
    assert content["samples_best"] == [max(images, key=score_of)]
    for branch, best in enumerate(content["samples_path_bestround"]):
        chain = [next(r["id"] for r in records if r["round"] == 4 and r["branch"] == branch)]
        while records[chain[-1]]["parent"] is not None:
            chain.append(records[chain[-1]]["parent"])
        assert len(chain) == 4
        assert best == max((images[position] for position in chain), key=score_of)
    assert sorted(file.name for file in searched.iterdir() if file.is_file()) == ["metadata.jsonl", "records.jsonl"]
    assert not list(searched.rglob("*.tmp"))


def test_results_are_further_names_of_the_same_files(searched):
    records = read_records(searched)
    for number in range(4):
        assert os.path.samefile(searched / records[number]["file"], searched / f"samples/{number:05d}.png")
    assert os.path.samefile(searched / records[-1]["file"], searched / "samples_lastround/00001.png")


def test_records_say_how_each_image_was_made_and_what_was_found(searched):
    records = read_records(searched)
    assert [record["id"] for record in records] == list(range(10))
    for record in records:
        seed = [9, 5, record["round"], record["branch"]]
        assert record["seed"] == seed
        assert record["file"] == f"midimg/{record['round']}_round@{'-'.join(map(str, seed))}.png"
        assert (record["index"], record["prompt"], record["model"]) == (5, "a red drum", "m")
        assert record["verdict"]["score"] == score_of((searched / record["file"]).read_bytes())
        assert record["verdict"]["explanation"] == "as a red drum"
        corrected = record["stage"] == "reflect"
        assert record["lora"] == ("l" if corrected else None)
        assert record["parent_file"] == (records[record["parent"]]["file"] if corrected else None)
    assert len({record["file"] for record in records}) == 10


def test_prompt_text_never_reaches_a_path(tmp_path):
    entry = {"prompt": "../../etc/passwd\u2028\0evil/..", "tag": "../x"}
    PromptFolder(tmp_path, 7, entry).write_image(PromptFolder.image_name(0, (1, 7, 0, 0)), IMAGE)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert names == {"00007", "00007/metadata.jsonl", "00007/midimg", "00007/midimg/0_round@1-7-0-0.png"}
    assert json.loads((tmp_path / "00007/metadata.jsonl").read_text()) == entry


def test_a_folder_of_another_prompt_is_refused(tmp_path):
    entry = {"prompt": "x", "include": [{"class": "cat"}]}
    check_entry(tmp_path, 0, entry)
    PromptFolder(tmp_path, 0, entry)
    PromptFolder(tmp_path, 0, dict(reversed(entry.items())))
    check_entry(tmp_path, 0, entry)
    with pytest.raises(InputError, match=r"metadata\.jsonl: another prompt than number 0"):
        PromptFolder(tmp_path, 0, {"prompt": "x"})
    (tmp_path / "00000/metadata.jsonl").write_text("{half")
    with pytest.raises(InputError, match="another prompt"):
        check_entry(tmp_path, 0, entry)


def test_an_image_is_there_once_its_last_byte_is(tmp_path):
    folder = PromptFolder(tmp_path, 0, {"prompt": "x"})
    assert not folder.has_image("midimg/a.png")
    folder.write_image("midimg/a.png", IMAGE)
    assert folder.has_image("midimg/a.png")
    assert folder.read_image("midimg/a.png").tobytes() == IMAGE.tobytes()
    content = (tmp_path / "00000/midimg/a.png").read_bytes()
    for length in range(len(content)):
        (tmp_path / "00000/midimg/a.png").write_bytes(content[:length])
        assert not folder.has_image("midimg/a.png"), length
    (tmp_path / "00000/midimg/b.png").mkdir()
    assert not folder.has_image("midimg/b.png")


def test_what_a_killed_process_half_wrote_goes_when_the_prompt_is_opened(tmp_path):
    (tmp_path / "00000/midimg").mkdir(parents=True)
    for half in (".metadata.jsonl.7.tmp", "midimg/.0_round@0-0-0-0.png.7.tmp"):
        (tmp_path / "00000" / half).write_bytes(b"half")
    PromptFolder(tmp_path, 0, {"prompt": "x"})
    assert list(files(tmp_path)) == ["00000/metadata.jsonl"]


def test_a_prompt_is_done_when_its_records_are_there_and_its_journal_is_gone(searched):
    out = searched.parent
    assert finished_records(out, 5) is not None
    assert finished_records(out, 6) is None
    (searched / JOURNAL).write_text('{"id": 0, "verdict": {"score": 1}}\n')
    assert finished_records(out, 5) is None
    (searched / JOURNAL).unlink()
    (searched / "records.jsonl").unlink()
    assert finished_records(out, 5) is None


def test_a_broken_record_is_named(searched):
    (searched / "records.jsonl").write_text('{"file": "a", "round": 0}\n{"file": "a"\n')
    with pytest.raises(InputError, match=r"records\.jsonl:2: not a JSON object"):
        read_records(searched)
    (searched / "records.jsonl").write_text('{"file": "a", "round": 0}\n{"file": "a"}\n')
    with pytest.raises(InputError, match=r"records\.jsonl:2: not a record of an image"):
        read_records(searched)


def test_records_with_any_text_are_read_again(searched):
    """Texts of language models hold line separators that end no line of JSON."""
    texts = [record["reflection"] for record in read_records(searched)[4:]]
    assert len(texts) == 6
    assert all(re.search("\u2028.*\x85", text) for text in texts)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: cannot read this image \(No such file"):
        read_image(tmp_path / "none.png")


# ---- links ----


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    return tmp_path


def test_a_link_replaces_what_was_there_and_leaves_its_source_alone(pair):
    link(pair / "a", pair / "target")
    link(pair / "b", pair / "target")
    link(pair / "b", pair / "target")
    assert files(pair) == {"a": b"a", "b": b"b", "target": b"b"}


def test_without_links_it_is_a_copy(pair, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(store.os, "link", refused)
    link(pair / "a", pair / "target")
    assert files(pair) == {"a": b"a", "b": b"b", "target": b"a"}
    assert not os.path.samefile(pair / "a", pair / "target")


def test_processes_of_the_same_number_write_under_different_names(pair):
    """In a container every process may have the same number."""
    assert len({temporary_path(pair / "target") for _ in range(100)}) == 100
    left = temporary_path(pair / "target")
    os.link(pair / "a", left)
    link(pair / "b", pair / "target")
    remove_beginnings(pair, "target")
    assert files(pair) == {"a": b"a", "b": b"b", "target": b"b"}
