"""``rflow train``: the corrector, an image verifier or a reflection generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rflow_jax.training.config import DEFAULT_TASK, config_class
from rflow_jax.utils import cli


def command(name: str, argv: Sequence[str]) -> cli.Command:
    """Training of the task that ``--task`` or the key ``task`` of the YAML file names, with its settings."""
    return cli.Command((config_class(cli.early_value(argv, "task", DEFAULT_TASK)),), _train)


def _train(config: Any) -> None:
    from rflow_jax.parallel.distributed import exit_process
    from rflow_jax.training.loop import train

    exit_process(cli.run(lambda: train(config)))
