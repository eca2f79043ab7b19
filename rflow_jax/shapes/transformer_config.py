"""The configuration of training the transformer of the shapes world from nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rflow_jax.errors import InputError
from rflow_jax.training.config import CommonConfig, LoopConfig
from rflow_jax.utils.ranges import (
    Count,
    CountOrZero,
    DenoisingSteps,
    Finite,
    PairCount,
    Positive,
    Seed,
    Share,
    Workers,
    require_ranges,
)


@dataclass(frozen=True)
class PictureDataConfig:
    """Pictures with their prompts, which are made at the start.

    Attributes:
        pictures: their number; each is used again and again.
        workers: processes that make them; null: all cores but one. 0 uses the run's own process.
    """

    pictures: PairCount = 200_000
    workers: Workers | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "data")


@dataclass(frozen=True)
class FlowConfig:
    """What is learned from a picture.

    Attributes:
        time_mean, time_std: times are the sigmoid of a normal number of this mean and standard deviation.
        reflections: how often T5 gets a reflection after the prompt.
        empty_texts: how often T5 gets no text.
        conditions: the share of a batch that is seen a second time, with a picture as the condition: half of these are
            told to keep everything, a quarter get the picture and its prompt alone, a quarter another picture, which
            says nothing.
    """

    time_mean: Finite = 0.6
    time_std: Positive = 1.1
    reflections: Share = 0.3
    empty_texts: Share = 0.1
    conditions: Share = 0.125

    def __post_init__(self) -> None:
        require_ranges(self, "flow")


@dataclass(frozen=True)
class PromptValidationConfig:
    """Validation by the judge, on prompts that are never trained on.

    Attributes:
        prompts: their number, an image each; 0: no validation.
        every: steps between two.
        num_inference_steps: Euler steps of an image.
        seed: of the images.
    """

    prompts: CountOrZero = 240
    every: Count = 1000
    num_inference_steps: DenoisingSteps = 20
    seed: Seed = 0

    def __post_init__(self) -> None:
        require_ranges(self, "validation")


@dataclass(frozen=True, kw_only=True)
class ShapesTransformerRunConfig(CommonConfig):
    """Trains the transformer of a FLUX on pictures of colored shapes and their prompts.

    Attributes:
        model: a folder in diffusers' layout, whose autoencoder and text encoders are trained already.
        trainable_parameters: has no effect here, and must be null.
    """

    task: Literal["shapes_transformer"] = "shapes_transformer"
    data: PictureDataConfig = field(default_factory=PictureDataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: LoopConfig = field(default_factory=lambda: LoopConfig(steps=6000, batch_size=1024, remat="none"))
    validation: PromptValidationConfig = field(default_factory=PromptValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable_parameters is not None:
            raise InputError("trainable_parameters: all of the transformer's are trained; leave it out")
