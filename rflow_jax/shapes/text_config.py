"""The configuration of training the text encoders of the shapes world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rflow_jax.errors import InputError
from rflow_jax.models.options import Remat
from rflow_jax.training.config import CommonConfig, LoopConfig
from rflow_jax.utils.ranges import BatchSize, Count, CountOrZero, Share, Workers, require_ranges


@dataclass(frozen=True)
class TextDataConfig:
    """The texts, which are made at the start.

    Attributes:
        texts: their number; each is used again and again.
        reflected: the share of them that have a reflection.
        kept: the share of reflections that say "Keep everything."; the others order changes.
        uniform: the share whose prompts are drawn from all of the grammar, those included that are held out from
            pictures: encoders that never read two shapes together don't tell them apart well.
        workers: processes that make them; null: all cores but one. 0 uses the run's own process.
    """

    texts: Count = 200_000
    reflected: Share = 0.6
    kept: Share = 0.15
    uniform: Share = 0.0
    workers: Workers | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "data")

    @property
    def shares(self) -> dict[str, Any]:
        """Those that say what kind of text is drawn."""
        return {"reflected": self.reflected, "kept": self.kept, "uniform": self.uniform}


@dataclass(frozen=True)
class TextValidationConfig:
    """Validation on held-out prompts.

    Attributes:
        texts: their number; 0: no validation.
        every: steps between two; there is one before the first step too.
    """

    texts: CountOrZero = 480
    every: Count = 500

    def __post_init__(self) -> None:
        require_ranges(self, "validation")


@dataclass(frozen=True)
class TextLoopConfig(LoopConfig):
    """The steps of a run; a sample is a text. Nothing is recomputed, and there is no attention to choose.

    Attributes:
        dtype: of the activations, and what parameters are rounded to where they are used; all are trained, in float32.
            With bfloat16 a GPU takes many times as long to add up the gradients of the embeddings.
    """

    steps: Count = 1500
    batch_size: BatchSize = 1024
    dtype: Literal["bfloat16", "float32"] = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remat != "none":
            raise InputError(f"train.remat is {self.remat}: of text encoders nothing is recomputed, give none")


@dataclass(frozen=True, kw_only=True)
class ShapesTextRunConfig(CommonConfig):
    """Trains the text encoders of a FLUX to tell what texts about colored shapes say.

    Attributes:
        model: the FLUX whose text encoders they are: a folder in diffusers' layout, such as ``rflow shapes model`` or
            a run of ``shapes_autoencoder`` writes.
        trainable_parameters: has no effect here, and must be null.
    """

    task: Literal["shapes_text"] = "shapes_text"
    data: TextDataConfig = field(default_factory=TextDataConfig)
    train: TextLoopConfig = field(default_factory=TextLoopConfig)
    validation: TextValidationConfig = field(default_factory=TextValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable_parameters is not None:
            raise InputError("trainable_parameters: all of both text encoders' are trained; leave it out")
