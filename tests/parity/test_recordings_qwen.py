"""``verify`` on recordings of Qwen2.5-VL of other sizes, made by PyTorch; and that it notices what is wrong."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="the parity extra is not installed")
pytest.importorskip("peft", reason="the parity extra is not installed")

from rflow_jax.parity import qwen
from rflow_jax.parity.measure import Recording, lines
from tests.kit.compare import save_arrays
from tests.kit.qwen import SHAPES
from tests.kit.record_qwen import QwenSizes, record_qwen

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def made(tmp_path_factory, golden):
    """(folder, what this package computes there)."""
    root = tmp_path_factory.mktemp("recordings")
    (root / "golden").mkdir()
    shutil.copy(golden / "golden" / "verify_meta.json", root / "golden")
    record_qwen(root, QwenSizes(SHAPES["units of nine"]), golden / "qwen" / "base")
    recording, results = Recording(root), {}
    with jax.default_matmul_precision("highest"):
        for name, check in ((qwen.BASE, qwen.base), (qwen.REWARD, qwen.reward)):
            results |= {f"{name}/{stage}": value for stage, value in check(recording)}
    return root, results


def test_other_sizes_agree(made):
    root, results = made
    verdicts = list(lines(Recording(root), results))
    assert not [str(line) for line in verdicts if line.status != "ok"]
    assert len(verdicts) == len([key for key in results if "in_" not in key]) > 50


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("golden_base", "vis_out"),
        ("golden_base", "last_hidden"),
        ("golden_base", "gen1_logits"),
        ("golden_base", "gen2_new_tokens"),
        ("golden_base", "vis_window_index"),
        ("golden_base", "input_ids_text"),
        ("golden_reward", "reward_special"),
        ("golden_reward", "reward_single2_mean"),
        ("golden_reward", "reward_special_nolora"),
        ("golden_reward", "last_hidden_mrope"),
        ("golden_reward", "attention_mask"),
    ],
)
def test_what_is_wrong_is_seen(made, tmp_path, file, array):
    root, results = made
    shutil.copytree(root, tmp_path / "changed")
    path = tmp_path / "changed" / "qwen" / f"{file}.npz"
    with np.load(path) as data:
        arrays = dict(data)
    # In a place that is no padding.
    first = (0, 0, 0)[: arrays[array].ndim]
    arrays[array][first] += max(1, round(1e-3 * np.linalg.norm(arrays[array])))
    save_arrays(path, arrays)
    wrong = [line for line in lines(Recording(tmp_path / "changed"), results) if line.status != "ok"]
    assert [(line.file, line.stage, line.status) for line in wrong] == [(f"qwen/{file}", array, "FAIL")]
