"""``rflow parity DIR``: this package beside recordings of the original."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rflow_jax.utils.cli import Command


@dataclass(frozen=True)
class ParityConfig:
    """The recordings to compare with.

    Attributes:
        dir: folder laid out like tests/golden.
    """

    dir: str


def command(name: str, argv: Sequence[str]) -> Command:
    """The comparison."""
    return Command((ParityConfig,), compare, ("dir",))


def compare(config: ParityConfig) -> int:
    """Prints a line for each recorded array and a count; 1 if one is past its tolerance, else 0."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the recordings are float32 on a CPU
    from rflow_jax.parity.measure import summary
    from rflow_jax.parity.run import verify
    from rflow_jax.utils.progress import count_progress

    with count_progress() as bar:
        task = bar.add_task("checking", total=None)
        begun = itertools.count()
        verdicts = verify(
            Path(config.dir),
            lambda name, of: bar.update(task, description=f"checking {name}", total=of, completed=next(begun)),
        )
    for line in verdicts:
        print(line)
    print(summary(verdicts))
    return int(any(line.status == "FAIL" for line in verdicts))
