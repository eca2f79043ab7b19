"""One line for every recorded array, by the tolerances that the recordings name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rflow_jax.verify.recording import Recording

INPUT = "input"  # a check's answer for an array that it fed in
GENERATED = re.compile(r"07_.*/.*(_latents_steps|_image_raw)")
LATER = ("08_", "qwen/", "nvila/")


@dataclass(frozen=True)
class Line:
    """The verdict on one array."""

    file: str
    stage: str
    error: float | None
    tolerance: float | None
    status: str  # ok, FAIL, exempt, input, not covered
    remark: str = ""

    def __str__(self) -> str:
        numbers = ("-" if x is None else f"{x:.2e}" for x in (self.error, self.tolerance))
        remark = f"  ({self.remark})" if self.remark else ""
        return f"{self.file} {self.stage} {' '.join(numbers)} {self.status}{remark}"


def lines(recording: Recording, results: Mapping[str, Any]) -> Iterator[Line]:
    """A line for every array that is not an input by name.

    Args:
        results: ``file/array`` -> what we computed, an exception, or :data:`INPUT`.
    """
    for name in recording.names():
        for stage, want in recording.arrays(name).items():
            if not stage.startswith("in_"):
                yield _line(recording, name, stage, want, results)


def _line(recording: Recording, name: str, stage: str, want: np.ndarray, results: Mapping[str, Any]) -> Line:
    array = f"{name}/{stage}"
    got = results.get(array)
    if isinstance(got, Exception):
        return Line(name, stage, None, None, "FAIL", f"{type(got).__name__}: {str(got).splitlines()[0]}")
    if isinstance(got, str) and got == INPUT:
        return Line(name, stage, None, None, "input")
    if recording.is_exempt(array):
        return Line(name, stage, None, None, "exempt")
    if got is None:
        return Line(name, stage, None, None, "not covered")
    error, tolerance = measure(np.asarray(got), want, array, recording.meta["tolerance"])
    return Line(name, stage, error, tolerance, "ok" if error <= tolerance else "FAIL")


def measure(got: np.ndarray, want: np.ndarray, array: str, tolerances: Mapping[str, Any]) -> tuple[float, float]:
    """(error, tolerance) of one array, each as its kind is measured."""
    if want.dtype == np.uint8:
        levels, share = _picture_tolerance(tolerances["uint8 images"])
        return _picture_error(got, want, levels), share
    if want.dtype.kind in "iub":
        same = got.shape == want.shape
        return (float(np.mean(got != want)) if same and want.size else float(not same)), 0.0
    key = "generate (07) latents and images" if GENERATED.fullmatch(array) else "module stages"
    return relative_error(got, want), float(tolerances[key])


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """L2 norm of the difference over that of the recording, in float64; 0/0 is 0, another shape or a NaN infinite."""
    if got.shape != want.shape:
        return float("inf")
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    difference, norm = np.linalg.norm((a - b).ravel()), np.linalg.norm(b.ravel())
    if difference == 0:
        return 0.0
    return float(difference / norm) if norm > 0 and np.isfinite(difference) else float("inf")


def _picture_error(got: np.ndarray, want: np.ndarray, levels: int) -> float:
    """The share of values that differ; infinite if one differs by more than ``levels``."""
    if got.shape != want.shape:
        return float("inf")
    difference = np.abs(got.astype(np.int64) - want.astype(np.int64))
    return float(np.mean(difference > 0)) if difference.size == 0 or difference.max() <= levels else float("inf")


def _picture_tolerance(text: str) -> tuple[int, float]:
    """From 'at most 1 level, in at most 0.5 % of the values'."""
    found = re.search(r"(\d+) levels?\D+([\d.]+) ?%", text)
    if not found:
        raise ValueError(f"verify_meta.json: the tolerance of uint8 images reads {text!r}")
    return int(found[1]), float(found[2]) / 100


def summary(all_lines: Iterable[Line]) -> str:
    """How many of each kind."""
    counts = Counter(line.status for line in all_lines)
    kinds = ("ok", "FAIL", "exempt", "input", "not covered")
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds) + f"; {sum(counts.values())} arrays"
