"""How far a result is from its recording, each kind of array as the recordings' tolerances measure it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Tolerances = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
# (array's name, what we computed, what was recorded) -> (error, tolerance)
Judge = Callable[[str, Any, np.ndarray], tuple[float, float]]

GENERATED = re.compile(r"07_.*/.*(_latents_steps|_image_raw)")
GRADIENTS, PARAMETERS = "08_grads", "08_params_"
MOVEMENT = "p - p_init, all tensors together"
TOGETHER, EACH, ZERO = "gradients, all tensors together", "gradients, each tensor", "tensors with zero gradient"


@dataclass(frozen=True)
class Moved:
    """Parameters after some steps: what is compared is how far they moved from ``start``."""

    value: np.ndarray
    start: np.ndarray


def judge_of(file: str, want: Arrays, got: Mapping[str, Any], tolerances: Tolerances) -> Judge:
    """How the arrays of a file are measured: most of them one by one, some as a whole too."""
    if file.startswith(PARAMETERS):
        whole = _movement_error(want, got), movement_tolerance(file, tolerances)
        return lambda stage, one, recorded: whole
    if file == GRADIENTS:
        return _gradient_judge(want, got, tolerances)
    return lambda stage, one, recorded: measure(np.asarray(one), recorded, f"{file}/{stage}", tolerances)


def measure(got: np.ndarray, want: np.ndarray, array: str, tolerances: Tolerances) -> tuple[float, float]:
    """(error, tolerance) of one array, named ``file/array``."""
    if want.dtype == np.uint8:
        levels, share = picture_tolerance(tolerances["uint8 images"])
        return _picture_error(got, want, levels), share
    if want.dtype.kind in "iub":
        same = got.shape == want.shape
        return (float(np.mean(got != want)) if same and want.size else float(not same)), 0.0
    if array.startswith("08_optim/") and array.endswith("_d"):
        return _column_error(got, want), float(tolerances["prodigy_d columns, clip2 run"])
    return relative_error(got, want), float(tolerances[_kind(array)])


def _kind(array: str) -> str:
    if array.startswith(("qwen/", "nvila/")):
        return "qwen, nvila"
    if GENERATED.fullmatch(array):
        return "generate (07) latents and images"
    if re.fullmatch(r"08_.*(/|_)loss(es)?", array):
        return "loss"
    return TOGETHER if re.fullmatch(r"08_.*(/|_)grad_norm\w*", array) else "module stages"


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """L2 norm of the difference over that of the recording, in float64; 0/0 is 0, another shape or a NaN infinite."""
    if got.shape != want.shape:
        return float("inf")
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    difference, norm = np.linalg.norm((a - b).ravel()), np.linalg.norm(b.ravel())
    if difference == 0:
        return 0.0
    return float(difference / norm) if norm > 0 and np.isfinite(difference) else float("inf")


def _column_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest of the columns' errors: they differ by orders of magnitude, and each counts."""
    if got.shape != want.shape:
        return float("inf")
    return max(relative_error(*columns) for columns in zip(got.T, want.T, strict=True))


def _picture_error(got: np.ndarray, want: np.ndarray, levels: int) -> float:
    """The share of values that differ; infinite if one differs by more than ``levels``."""
    if got.shape != want.shape:
        return float("inf")
    difference = np.abs(got.astype(np.int64) - want.astype(np.int64))
    return float(np.mean(difference > 0)) if difference.size == 0 or difference.max() <= levels else float("inf")


def picture_tolerance(text: str) -> tuple[int, float]:
    """(levels, share) from 'at most 1 level, in at most 0.5 % of the values'."""
    found = re.search(r"(\d+) levels?\D+([\d.]+) ?%", text)
    if not found:
        raise ValueError(f"verify_meta.json: the tolerance of uint8 images reads {text!r}")
    return int(found[1]), float(found[2]) / 100


def movement_tolerance(file: str, tolerances: Tolerances) -> float:
    """The tolerance that names this run of an optimizer; the strictest one for a run that none names."""
    run = file.removeprefix(PARAMETERS)
    known = {key: float(value) for key, value in tolerances.items() if key.startswith(MOVEMENT)}
    named = [value for key, value in known.items() if run in re.split(r"[:,] *", key)]
    return named[0] if named else min(known.values())


def _movement_error(want: Arrays, got: Mapping[str, Any]) -> float:
    """Of p - p_init over all tensors together; infinite unless every tensor is there in its shape."""
    moved = [(got.get(stage), recorded) for stage, recorded in want.items()]
    if any(not isinstance(one, Moved) or one.value.shape != recorded.shape for one, recorded in moved):
        return float("inf")
    ours = [one.value.astype(np.float64) - one.start for one, _ in moved if one is not None]
    theirs = [recorded.astype(np.float64) - one.start for one, recorded in moved if one is not None]
    return relative_error(_flat(ours), _flat(theirs))


def _gradient_judge(want: Arrays, got: Mapping[str, Any], tolerances: Tolerances) -> Judge:
    complete = all(stage in got and np.shape(got[stage]) == recorded.shape for stage, recorded in want.items())
    together = _flat([np.asarray(got[stage]) for stage in want]) if complete else np.zeros(0)
    in_all = relative_error(together, _flat(list(want.values()))) <= float(tolerances[TOGETHER])
    absolute = float(str(tolerances[ZERO]).removeprefix("absolute "))

    def judge(stage: str, one: Any, recorded: np.ndarray) -> tuple[float, float]:
        one = np.asarray(one)
        if not in_all or one.shape != recorded.shape:
            return float("inf"), float(tolerances[TOGETHER])
        if not recorded.any():
            return float(np.abs(one).max(initial=0.0)), absolute
        return relative_error(one, recorded), float(tolerances[EACH])

    return judge


def _flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])
