"""``rflow shapes``: new models for the world of colored shapes, and what to train them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rflow_jax.utils.cli import Command
from rflow_jax.utils.ranges import Seed, require_ranges


@dataclass(frozen=True)
class NewFluxConfig:
    """An untrained FLUX of 13 million parameters, in diffusers' layout.

    Attributes:
        out: folder to write; must not exist.
        seed: of the parameters.
    """

    out: str
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_ranges(self)


@dataclass(frozen=True)
class NewVerifierConfig(NewFluxConfig):
    """An untrained Qwen2.5-VL of a million parameters, in Transformers' layout."""


def command(name: str, argv: Sequence[str]) -> Command:
    """The command of this name."""
    if name == "shapes pairs":
        from rflow_jax.shapes.pairs import PairsOfShapesConfig

        return Command((PairsOfShapesConfig,), pairs, ("out",))
    if name == "shapes questions":
        from rflow_jax.shapes.questions import QuestionsConfig

        return Command((QuestionsConfig,), questions, ("out",))
    if name == "shapes scaling":
        from rflow_jax.shapes.scaling import ScalingConfig

        return Command((ScalingConfig,), scaling, ("out",))
    if name == "shapes verifier":
        return Command((NewVerifierConfig,), new_verifier, ("out",))
    return Command((NewFluxConfig,), new_flux, ("out",))


def new_flux(config: NewFluxConfig) -> None:
    """Writes the model."""
    from rflow_jax.shapes.model import write_start

    _say(config.out, write_start(Path(config.out), config.seed))


def new_verifier(config: NewVerifierConfig) -> None:
    """Writes the model."""
    from rflow_jax.shapes.vision_language import write_start

    _say(config.out, write_start(Path(config.out), config.seed))


def pairs(config: Any) -> None:
    """Writes the shards."""
    from rflow_jax.shapes.pairs import write_pairs

    counts = write_pairs(config)
    print(f"{config.out}: {sum(counts.values())} pairs ({', '.join(f'{n} {name}' for name, n in counts.items())})")


def questions(config: Any) -> None:
    """Writes the chats."""
    from rflow_jax.shapes.questions import write_questions

    learned, held_out = write_questions(config)
    print(f"{config.out}: {learned} chats, and {held_out} held out")


def scaling(config: Any) -> None:
    """Runs what is missing, and prints the table."""
    from rflow_jax.shapes.scaling import run_scaling
    from rflow_jax.shapes.scaling_table import markdown

    print(markdown(run_scaling(config)))


def _say(out: str, count: int) -> None:
    print(f"{out}: {count:,} parameters, not trained yet")
