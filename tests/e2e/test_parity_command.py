"""``rflow parity`` on the recordings of the original, and on recordings that were tampered with."""

import json
import shutil

import numpy as np
import pytest

from rflow_jax.commands.parity import ParityConfig, compare
from rflow_jax.errors import InputError
from rflow_jax.parity.measure import (
    ArrayResult,
    Moved,
    Recording,
    judge_of,
    lines,
    measure,
    movement_tolerance,
    summary,
)
from rflow_jax.parity.run import CHECKS, verify
from tests.kit.compare import save_arrays

TOLERANCES = json.loads("""{"uint8 images": "at most 1 level, in at most 0.5 % of the values", "module stages": 2e-05,
    "generate (07) latents and images": 0.0001, "qwen, nvila": 0.0001}""")


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


@pytest.mark.parametrize(
    ("got", "want", "array", "ok"),
    [
        (np.float32([1, 2]), np.float32([1, 2]), "01_x/out", True),
        (np.float32([1, 2.001]), np.float32([1, 2]), "01_x/out", False),
        (np.float32([1, 2.0001]), np.float32([1, 2]), "07_generate/a_latents_steps", True),
        (np.float32([1, 2.0001]), np.float32([1, 2]), "nvila/rope/inv_freq", True),
        (np.float32([1, 2.001]), np.float32([1, 2]), "nvila/rope/inv_freq", False),
        (np.float32([1, 2.0001]), np.float32([1, 2]), "qwen/golden_base/vis_out", True),
        (np.float32([1, 2.001]), np.float32([1, 2]), "qwen/golden_base/vis_out", False),
        (np.float32([1, np.nan]), np.float32([1, 2]), "01_x/out", False),
        (np.float32([[1, 2]]), np.float32([1, 2]), "01_x/out", False),
        (np.zeros(3, np.float32), np.zeros(3, np.float32), "01_x/out", True),
        (np.int32([1, 2]), np.int64([1, 2]), "05_x/ids", True),
        (np.int32([1, 3]), np.int64([1, 2]), "05_x/ids", False),
        (np.full(400, 8, np.uint8), np.r_[np.full(399, 8), 9].astype(np.uint8), "07_x/image_uint8", True),
        (np.full(400, 8, np.uint8), np.r_[np.full(399, 8), 10].astype(np.uint8), "07_x/image_uint8", False),
        (np.full(400, 8, np.uint8), np.r_[np.full(390, 8), [9] * 10].astype(np.uint8), "07_x/image_uint8", False),
    ],
)
def test_how_arrays_are_measured(got, want, array, ok):
    error, tolerance = measure(got, want, array, TOLERANCES)
    assert (error <= tolerance) is ok


def test_an_optimizer_that_does_nothing_fails():
    start, end = np.ones(4, np.float32), np.float32([1, 1.1, 1, 0.9])
    tolerances = {
        "p - p_init, all tensors together: adamw3, prodigy25": 0.002,
        "p - p_init, all tensors together: prodigy3": 0.01,
    }
    for value, ok in ((end, True), (start, False)):
        judge = judge_of("08_params_adamw3", {"a": end}, {"a": Moved(value, start)}, tolerances)
        error, tolerance = judge("a", Moved(value, start), end)
        assert (error <= tolerance) is ok
    error, tolerance = judge_of("08_params_adamw3", {"a": end}, {}, tolerances)("a", None, end)
    assert error > tolerance
    assert movement_tolerance("08_params_prodigy3", tolerances) == 0.01
    assert movement_tolerance("08_params_sgd7", tolerances) == 0.002


@pytest.mark.parametrize(("gradient", "ok"), [([1.0, 2.0], True), ([1.0, 2.01], False), ([1.00005, 2.0], True)])
def test_gradients_count_alone_and_together(gradient, ok):
    tolerances = {
        "gradients, all tensors together": 1e-4,
        "gradients, each tensor": 1e-3,
        "tensors with zero gradient": "absolute 1e-9",
    }
    want = {"a": np.float32([1, 2]), "zero": np.zeros(2, np.float32)}
    got = {"a": np.float32(gradient), "zero": np.float32([0, 1e-10])}
    judge = judge_of("08_grads", want, got, tolerances)
    verdicts = [np.less_equal(*judge(stage, got[stage], want[stage])) for stage in want]
    assert verdicts == [ok, ok]
    if ok:
        assert judge("zero", np.float32([0, 1e-8]), want["zero"]) == (pytest.approx(1e-8), 1e-9)


def test_exempt_pairs_are_still_checked(golden):
    recording = Recording(golden)
    broken = {"03_variants/out_c_factor0_union_false": AssertionError("was not refused")}
    status = {f"{line.file}/{line.stage}": line.status for line in lines(recording, broken)}
    assert status["03_variants/out_c_factor0_union_false"] == "FAIL"
