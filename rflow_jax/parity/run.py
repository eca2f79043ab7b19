"""Runs every check on a folder of recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from rflow_jax.parity import encoders, flux, generation, nvila, qwen, training
from rflow_jax.parity.measure import PARAMETERS, ArrayResult, Recording, lines

CHECKS: dict[str, Callable[[Recording], Iterator[tuple[str, Any]]]] = {
    flux.PLAIN: flux.plain,
    flux.CONDITIONED: flux.conditioned,
    flux.VARIANTS: flux.variants,
    encoders.AUTOENCODER: encoders.autoencoder,
    encoders.TEXT: encoders.text,
    encoders.SCHEDULE: encoders.schedule,
    generation.GENERATION: generation.generation,
    training.STEP: training.step,
    training.GRADIENTS: training.gradients,
    training.OPTIMIZERS: training.optimizers,
    qwen.BASE: qwen.base,
    qwen.REWARD: qwen.reward,
}


def verify(root: Path, on_check: Callable[[str, int], None] | None = None) -> list[ArrayResult]:
    """Compares this package with the recordings below ``root``: a line for each recorded array.

    A check that raises is a FAIL on each of its missing arrays, and the others go on.

    Args:
        on_check: called with the name of each check when it begins, and the number of checks.
    """
    recording = Recording(root)
    results: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        due = {name: check for name, check in CHECKS.items() if recording.has(name)} | nvila.checks(recording)
        for name, check in due.items():
            if on_check:
                on_check(name, len(due))
            results |= _run(recording, name, check)
    return list(lines(recording, results))


def _run(recording: Recording, name: str, check: Callable) -> dict[str, Any]:
    results: dict[str, Any] = {}
    try:
        for stage, value in check(recording):
            results[stage if "/" in stage else f"{name}/{stage}"] = value
    except Exception as error:  # one broken check must not hide the others
        owed = [name]
        if name == training.OPTIMIZERS:
            owed += [file for file in recording.names() if file.startswith(PARAMETERS)]
        for array in (f"{file}/{stage}" for file in owed for stage in recording.arrays(file)):
            if not recording.is_exempt(array):
                results.setdefault(array, error)
    return results
