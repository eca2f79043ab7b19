"""How arrays are compared with recorded ones."""

import json

import numpy as np
import pytest

from rflow_jax.parity.measure import Moved, judge_of, measure, movement_tolerance

TOLERANCES = json.loads("""{"uint8 images": "at most 1 level, in at most 0.5 % of the values", "module stages": 2e-05,
    "generate (07) latents and images": 0.0001, "qwen, nvila": 0.0001}""")


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
