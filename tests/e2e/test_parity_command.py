"""``rflow parity`` on the recordings of the original, and on recordings that were tampered with."""

import shutil

import numpy as np
import pytest

from rflow_jax.commands.parity import ParityConfig, compare
from rflow_jax.errors import InputError
from rflow_jax.parity.measure import (
    ArrayResult,
    Recording,
    lines,
    summary,
)
from rflow_jax.parity.run import CHECKS, verify
from tests.kit.compare import save_arrays


@pytest.fixture(scope="module")
def verdicts(request) -> list[ArrayResult]:
    return verify(request.getfixturevalue("golden"))


def test_every_recording_of_the_models_is_matched(verdicts):
    covered = [line for line in verdicts if not line.file.startswith("nvila/")]
    assert {line.file for line in covered} >= set(CHECKS)
    assert [str(line) for line in covered if line.status not in ("ok", "exempt")] == ["08_optim clip2 - - input"]
    assert sum(line.status == "ok" for line in covered) > 440


def test_every_recording_of_nvila_is_matched(verdicts):
    covered = [line for line in verdicts if line.file.startswith("nvila/")]
    assert len({line.file for line in covered}) == 17
    fed = {f"{line.file} {line.stage}" for line in covered if line.status == "input"}
    assert fed == {
        *(f"nvila/projector {name}_in" for name in ("g8", "g7", "g6", "g4", "g3", "tiny")),
        *(f"nvila/vision_{name} image" for name in ("imgA", "imgB")),
        *(f"nvila/tiling mode_{name}_source" for name in ("rgba", "l")),
    }
    exempt = {line.stage for line in covered if line.status == "exempt"}
    assert exempt == {"scores0_sampling", "logits_last_fp16", "greedy_tokens_fp16", "logits_last_half_rope"}
    assert [str(line) for line in covered if line.status not in ("ok", "input", "exempt")] == []


def test_only_what_the_metadata_names_is_exempt(verdicts, golden):
    recording = Recording(golden)
    assert all(recording.is_exempt(f"{line.file}/{line.stage}") for line in verdicts if line.status == "exempt")


def test_what_is_not_covered_is_said(verdicts):
    files = {line.file for line in verdicts if line.status == "not covered"}
    assert files == set(), "every recording here has a check"
    assert summary(verdicts).endswith(f"{len(verdicts)} arrays")


def test_every_array_that_is_no_input_has_its_line(verdicts, golden):
    recording = Recording(golden)
    wanted = {f"{name}/{stage}" for name in recording.names() for stage in recording.arrays(name) if stage[:3] != "in_"}
    assert {f"{line.file}/{line.stage}" for line in verdicts} == wanted
    assert len(verdicts) == len(wanted)


@pytest.fixture
def one_file(golden, tmp_path):
    """A folder with nothing recorded but the schedule."""
    for name in ("pipeline", "lora"):
        (tmp_path / name).symlink_to(golden / name)
    (tmp_path / "golden").mkdir()
    for name in ("06_scheduler.npz", "verify_meta.json", "generate_meta.json"):
        shutil.copy(golden / "golden" / name, tmp_path / "golden")
    return tmp_path


def _change(folder, **arrays):
    path = folder / "golden" / "06_scheduler.npz"
    with np.load(path) as data:
        save_arrays(path, dict(data) | arrays)


def test_the_command_line(one_file, capsys):
    assert compare(ParityConfig(str(one_file))) == 0
    _change(one_file, sigmas_1024_4=np.linspace(1, 0, 5, dtype=np.float32), mystery=np.zeros(2, np.float32))
    assert compare(ParityConfig(str(one_file))) == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out if line.endswith("FAIL")] == [["06_scheduler", "sigmas_1024_4"]]
    assert "06_scheduler mystery - - not covered" in out


def test_a_size_without_a_name_is_an_input(one_file):
    recording = Recording(one_file)
    mu = np.float64(recording.pipeline.bundle.schedule.mu(777))
    sigmas = recording.pipeline.bundle.schedule.sigmas(3, 777)
    _change(one_file, mu_odd=mu, sigmas_odd_3=sigmas)
    status = {line.stage: line.status for line in verify(one_file)}
    assert (status["mu_odd"], status["sigmas_odd_3"]) == ("input", "ok")


def test_a_check_that_breaks_off_fails_what_it_owed(one_file):
    (one_file / "golden" / "generate_meta.json").write_text("{")
    verdicts = verify(one_file)
    assert {line.status for line in verdicts} == {"ok", "FAIL"}
    assert "generate_meta.json" in next(line.remark for line in verdicts if line.status == "FAIL")


def test_bad_folders(tmp_path, one_file):
    with pytest.raises(InputError, match="contains no recordings"):
        verify(tmp_path / "none")
    (one_file / "golden" / "06_scheduler.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(InputError, match=r"06_scheduler\.npz: cannot be read"):
        verify(one_file)


def test_exempt_pairs_are_still_checked(golden):
    recording = Recording(golden)
    broken = {"03_variants/out_c_factor0_union_false": AssertionError("was not refused")}
    status = {f"{line.file}/{line.stage}": line.status for line in lines(recording, broken)}
    assert status["03_variants/out_c_factor0_union_false"] == "FAIL"
