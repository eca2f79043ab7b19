"""One line for every recorded array, by the tolerances that the recordings name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rflow_jax.verify.measure import judge_of
from rflow_jax.verify.recording import Recording

INPUT = "input"  # a check's answer for an array that it fed in


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
        arrays = {stage: want for stage, want in recording.arrays(name).items() if not stage.startswith("in_")}
        got = {stage: results.get(f"{name}/{stage}") for stage in arrays}
        judge = judge_of(name, arrays, got, recording.meta["tolerance"])
        for stage, want in arrays.items():
            status, remark = _without_numbers(recording, f"{name}/{stage}", got[stage])
            if status is not None:
                yield Line(name, stage, None, None, status, remark)
                continue
            error, tolerance = judge(stage, got[stage], want)
            yield Line(name, stage, error, tolerance, "ok" if error <= tolerance else "FAIL")


def _without_numbers(recording: Recording, array: str, got: Any) -> tuple[str | None, str]:
    """(status, remark) of an array that is not compared, (None, "") of one that is."""
    if isinstance(got, Exception):
        return "FAIL", f"{type(got).__name__}: {str(got).splitlines()[0]}"
    if isinstance(got, str) and got == INPUT:
        return "input", ""
    if recording.is_exempt(array):
        return "exempt", ""
    return ("not covered", "") if got is None else (None, "")


def summary(all_lines: Iterable[Line]) -> str:
    """How many of each kind."""
    counts = Counter(line.status for line in all_lines)
    kinds = ("ok", "FAIL", "exempt", "input", "not covered")
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds) + f"; {sum(counts.values())} arrays"
