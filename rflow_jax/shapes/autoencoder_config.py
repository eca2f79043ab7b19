"""The configuration of training the autoencoder of the shapes world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rflow_jax.errors import InputError
from rflow_jax.models.options import Remat
from rflow_jax.training.config import CommonConfig, LoopConfig
from rflow_jax.utils.checks import require_least


@dataclass(frozen=True)
class SceneDataConfig:
    """The scenes, which are made at the start.

    Attributes:
        scenes: their number; each is used again and again.
        spoiled: the share of them that fail their prompts.
        workers: processes that make them; null: all cores but one. 0 uses the run's own process.
    """

    scenes: int = 50_000
    spoiled: float = 0.3
    workers: int | None = None

    def __post_init__(self) -> None:
        require_least(self, "data", scenes=1, workers=0)
        if not 0 <= self.spoiled <= 1:
            raise InputError(f"data.spoiled is {self.spoiled}: give a share, from 0 to 1")


@dataclass(frozen=True)
class SceneValidationConfig:
    """Validation on scenes that are not trained on.

    Attributes:
        scenes: their number; 0: no validation.
        every: steps between two; there is one before the first step too.
    """

    scenes: int = 256
    every: int = 500

    def __post_init__(self) -> None:
        require_least(self, "validation", scenes=0, every=1)


@dataclass(frozen=True)
class AutoencoderLoopConfig(LoopConfig):
    """The steps of a run; a sample is a picture. Nothing is recomputed, and there is no attention to choose.

    Attributes:
        dtype: of the activations; all parameters are trained, in float32.
    """

    steps: int = 3400
    batch_size: int = 128
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

    kl_weight: float = 2e-4

    def __post_init__(self) -> None:
        require_least(self, "autoencoder", kl_weight=0)


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
