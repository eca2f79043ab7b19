"""Which of a reward model's checkpoints is meant; nothing here imports JAX."""

from __future__ import annotations

import re
from pathlib import Path

from rflow_jax.errors import InputError


def find_step(folder: Path, step: int | None = None) -> tuple[int, Path]:
    """A checkpoint's number and its folder ``checkpoint-N``.

    Args:
        step: its number; None: the latest.

    Raises:
        InputError: there is none, or none of this number.
    """
    found = {
        int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    if not found:
        raise InputError(f"{folder}: no folder checkpoint-N; is it the folder of a reward model?")
    if step is not None and step not in found:
        raise InputError(f"{folder}: no checkpoint-{step}, only {', '.join(map(str, sorted(found)))}")
    number = max(found) if step is None else step
    return number, found[number]
