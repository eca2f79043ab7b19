"""``python -m convert_weights verify DIR``."""

from __future__ import annotations

import itertools
from pathlib import Path


def main(folder: str) -> int:
    """Prints a line for each recorded array and a count; 1 if one is past its tolerance, else 0."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the recordings are float32 on a CPU
    from rflow_jax.progress import count_progress
    from rflow_jax.verify.report import summary
    from rflow_jax.verify.run import verify

    with count_progress() as bar:
        task = bar.add_task("checking", total=None)
        begun = itertools.count()
        verdicts = verify(
            Path(folder),
            lambda name, of: bar.update(task, description=f"checking {name}", total=of, completed=next(begun)),
        )
    for line in verdicts:
        print(line)
    print(summary(verdicts))
    return int(any(line.status == "FAIL" for line in verdicts))
