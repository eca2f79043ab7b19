"""After a power cut at any sync, a search goes on as if nothing had happened; what is damaged is set aside."""

import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rflow_jax.commands.filter import FilterConfig, filter_nfe
from rflow_jax.errors import InputError
from rflow_jax.scoring.results import ImageResult, Results
from rflow_jax.scoring.targets import Target
from rflow_jax.search.budget import Budget
from rflow_jax.search.prompt_folder import Journal, PromptFolder, finished_records, read_records
from rflow_jax.utils.atomic_io import append_line, inside, set_aside, write_file
from rflow_jax.verifiers.base import Verdict
from rflow_jax.weights.saving import atomic_output, save_tensors
from tests.kit.power_cuts import Disk
from tests.kit.searching import drive, models, prompt_run


def content(root: Path) -> dict[str, bytes]:
    """Of all files that are not set aside."""
    found = {path: str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for path, name in found.items() if ".damaged" not in name}


def finish(out: Path) -> None:
    if finished_records(out, 5) is None:
        drive(prompt_run(out), models(), random.Random(1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    finish(out)
    return content(out)


def test_a_search_that_lost_its_power_at_any_sync_ends_as_the_uninterrupted_one(tmp_path, monkeypatch, whole):
    out = tmp_path / "out"
    out.mkdir()
    disk = Disk(out, tmp_path / "states", every=3)
    with monkeypatch.context() as patched:
        disk.watch(patched)
        finish(out)
    assert disk.syncs > 30
    assert content(out) == whole
    for state in disk.states:
        finish(state)
        assert content(state) == whole, state.name


def test_what_is_done_is_on_disk_when_the_command_ends(tmp_path, monkeypatch, whole):
    out = tmp_path / "out"
    out.mkdir()
    disk = Disk(out, tmp_path / "states", every=10**9)
    with monkeypatch.context() as patched:
        disk.watch(patched)
        finish(out)
    disk.copy(out, tmp_path / "after", only_synced=True)
    assert content(tmp_path / "after") == whole


@pytest.mark.parametrize("damage", [b"", b"\0" * 500, b"[1]\n", b"null\n", b'{"file": 1, "round": "x"}\n', b"{half"])
def test_damaged_records_are_set_aside_and_made_again(tmp_path, whole, damage, capsys):
    finish(tmp_path)
    records = tmp_path / "00005/records.jsonl"
    records.write_bytes(damage)
    assert finished_records(tmp_path, 5) is None
    finish(tmp_path)
    assert content(tmp_path) == whole
    assert records.with_name("records.jsonl.damaged").read_bytes() == damage
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "line", [b"\0\0\0", b"[]", b"null", b'{"id": "0", "verdict": {}}', b'{"id": 0, "verdict": [1]}', b"\xff{", b"{"]
)
def test_a_damaged_line_among_others_costs_only_itself(tmp_path, line, capsys):
    journal = Journal(tmp_path / "j")
    journal.note(0, "verdict", {"score": 1.0})
    with open(tmp_path / "j", "ab") as file:
        file.write(line + b"\n")
    Journal(tmp_path / "j").note(1, "reflection", {"text": "x"})
    capsys.readouterr()
    again = Journal(tmp_path / "j")
    assert (again.known(0, "verdict"), again.known(1, "reflection")) == ({"score": 1.0}, {"text": "x"})
    assert (tmp_path / "j.damaged").exists()
    assert not capsys.readouterr().err


def test_a_damaged_image_is_drawn_again(tmp_path, whole, capsys):
    drive(prompt_run(tmp_path), models(), random.Random(1), steps=6)
    image = next((tmp_path / "00005/midimg").glob("*.png"))
    broken = bytearray(image.read_bytes())
    broken[len(broken) // 2] ^= 1
    image.write_bytes(broken)
    finish(tmp_path)
    assert content(tmp_path) == whole
    assert "a checksum is wrong" in capsys.readouterr().err


def test_empty_metadata_is_no_file(tmp_path, whole):
    drive(prompt_run(tmp_path), models(), random.Random(1), steps=6)
    (tmp_path / "00005/metadata.jsonl").write_bytes(b"\0" * 9)
    finish(tmp_path)
    assert content(tmp_path) == whole


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret", "out_link/x", "", None, 3, "a\0b"])
def test_a_record_names_no_file_outside_its_folder(tmp_path, name):
    (tmp_path / "run/00005").mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    os.symlink(tmp_path, tmp_path / "run/00005/out_link")
    record = {"file": name, "round": 0, "stage": "noise", "verdict": {"score": 1.0}}
    (tmp_path / "run/00005/records.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "run/config.yaml").write_text("strategy: noise\n")
    with pytest.raises(InputError, match=r"records\.jsonl:1: not a record of an image"):
        read_records(tmp_path / "run/00005")
    with pytest.raises(InputError):
        filter_nfe(FilterConfig(str(tmp_path / "run")))
    assert not list(tmp_path.rglob("nfe*/*"))
    with pytest.raises(InputError):
        inside(tmp_path / "run/00005", name)


def test_usage_of_other_types_is_nothing(tmp_path):
    for text in ('{"seconds": [], "images": null, "roles": []}', '{"roles": {"verifier": [1]}}', '{"images": NaN}'):
        (tmp_path / "usage.json").write_text(text)
        assert Budget(tmp_path, 0, ("verifier",), 1.0).total().calls == 0
    (tmp_path / "usage.json").write_text('{"roles": {"verifier": {"calls": "7", "cost": -1, "attempts": 2}}}')
    assert Budget(tmp_path, 0, ("verifier",), 1.0).total().attempts == 2


def found(number: int) -> ImageResult:
    return ImageResult(Target(Path(f"{number}.png"), {"prompt": "x"}), str(number), Verdict(float(number)), "hash")


def test_a_file_of_verdicts_keeps_its_whole_lines(tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    with Results(out, {}) as results:
        for number in range(3):
            results.add(found(number))
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])
    with Results(out, {}) as results:
        known = [results.known(found(number).target, str(number)) is not None for number in range(3)]
        results.add(found(1))
    assert known == [True, False, True]
    assert capsys.readouterr().err.count("\n") == 1
    out.write_bytes(b"\0" * 99)
    with Results(out, {}) as results:
        assert not results
    assert out.read_bytes() == b""
    out.write_text("another program's\n")
    with pytest.raises(InputError, match="not a line of rflow score"):
        Results(out, {})
    assert out.read_text() == "another program's\n"


def test_an_export_is_whole_or_absent(tmp_path, monkeypatch):
    root = tmp_path / "out"
    root.mkdir()
    disk = Disk(root, tmp_path / "states")
    with monkeypatch.context() as patched:
        disk.watch(patched)
        with atomic_output(root / "lora") as partial:
            partial.mkdir()
            save_tensors(partial / "a.safetensors", {"x": np.arange(5.0)})
            write_file(partial / "sub/config.json", "{}")
    whole = content(root)
    for state in disk.states:
        if (state / "lora").exists():
            (state / ".lora.lock").unlink(missing_ok=True)  # which blocks nobody
            assert content(state) == whole, state.name
    assert any((state / "lora").exists() for state in disk.states)


def test_what_is_set_aside_never_replaces_another(tmp_path):
    names = []
    for text in "abc":
        write_file(tmp_path / "f", text)
        names.append(set_aside(tmp_path / "f").name)
    assert names == ["f.damaged", "f.damaged-2", "f.damaged-3"]


def test_lines_are_synced_in_groups(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    journal = Journal(tmp_path / "j")
    for number in range(50):
        journal.note(number, "verdict", asdict(Verdict(1.0)))
    assert len(synced) == 2  # the file and its folder
    append_line(tmp_path / "j", "x\n", sync=True)
    assert len(synced) == 3


def test_images_are_on_disk_before_their_verdicts(tmp_path, monkeypatch):
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    PromptFolder(tmp_path, 0, {"prompt": "x"}).write_image("midimg/a.png", Image.new("RGB", (8, 8)))
    assert "a.png" in synced[-2]
    assert synced[-1].endswith("midimg")
