"""The configuration of training the autoencoder of the shapes world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rflow_jax.errors import InputError
from rflow_jax.models.options import Remat
from rflow_jax.training.config import CommonConfig, LoopConfig
from rflow_jax.utils.ranges import BatchSize, Count, CountOrZero, NotNegative, Share, Workers, require_ranges


@dataclass(frozen=True)
class SceneDataConfig:
    """The scenes, which are made at the start.

    Attributes:
        scenes: their number; each is used again and again.
        spoiled: the share of them that fail their prompts.
        workers: processes that make them; null: all cores but one. 0 uses the run's own process.
    """

    scenes: Count = 50_000
    spoiled: Share = 0.3
    workers: Workers | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "data")


@dataclass(frozen=True)
class SceneValidationConfig:
    """Validation on scenes that are not trained on.

    Attributes:
        scenes: their number; 0: no validation.
        every: steps between two; there is one before the first step too.
    """

    scenes: CountOrZero = 256
    every: Count = 500

    def __post_init__(self) -> None:
        require_ranges(self, "validation")


@dataclass(frozen=True)
class AutoencoderLoopConfig(LoopConfig):
    """The steps of a run; a sample is a picture. Nothing is recomputed, and there is no attention to choose.

    Attributes:
        dtype: of the activations; all parameters are trained, in float32.
    """

    steps: Count = 3400
    batch_size: BatchSize = 128
    remat: Remat = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remat != "none":
            raise InputError(f"train.remat is {self.remat}: of an autoencoder nothing is recomputed, give none")


@dataclass(frozen=True)
class AutoencoderTaskConfig:
    """What is learned.

    Attributes:
        kl_weight: of the latents' divergence from a standard normal, per number, beside the squared error of pixels
            in [-1, 1].
    """

    kl_weight: NotNegative = 2e-4

    def __post_init__(self) -> None:
        require_ranges(self, "autoencoder")


@dataclass(frozen=True, kw_only=True)
class ShapesAutoencoderRunConfig(CommonConfig):
    """Trains the autoencoder of a FLUX on pictures of colored shapes.

    Attributes:
        model: the FLUX whose autoencoder it is: a folder in diffusers' layout, such as ``rflow shapes model`` writes.
        trainable_parameters: has no effect here, and must be null.
    """

    task: Literal["shapes_autoencoder"] = "shapes_autoencoder"
    data: SceneDataConfig = field(default_factory=SceneDataConfig)
    autoencoder: AutoencoderTaskConfig = field(default_factory=AutoencoderTaskConfig)
    train: AutoencoderLoopConfig = field(default_factory=AutoencoderLoopConfig)
    validation: SceneValidationConfig = field(default_factory=SceneValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable_parameters is not None:
            raise InputError("trainable_parameters: all of the autoencoder's are trained; leave it out")
