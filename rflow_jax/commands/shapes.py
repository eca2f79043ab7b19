"""``rflow shapes model``: a new FLUX for the world of colored shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rflow_jax.utils.checks import require_seed
from rflow_jax.utils.cli import Command


@dataclass(frozen=True)
class NewModelConfig:
    """An untrained FLUX of 13 million parameters, in diffusers' layout.

    Attributes:
        out: folder to write; must not exist.
        seed: of the parameters.
    """

    out: str
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)


def command(name: str, argv: Sequence[str]) -> Command:
    """The command of this name."""
    return Command((NewModelConfig,), new_model, ("out",))


def new_model(config: NewModelConfig) -> None:
    """Writes the model."""
    from rflow_jax.shapes.model import write_start

    count = write_start(Path(config.out), config.seed)
    print(f"{config.out}: {count:,} parameters, not trained yet")
