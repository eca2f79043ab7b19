"""Settings that the tasks on a Qwen2.5-VL share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from rflow_jax.errors import InputError
from rflow_jax.training.config import CommonConfig
from rflow_jax.utils.checks import require_pattern
from rflow_jax.utils.ranges import (
    CountOrZero,
    Pixels,
    Positive,
    Range,
    Rank,
    Ratio,
    SmallCount,
    Workers,
    require_ranges,
)

# The linears of the language model's blocks.
LANGUAGE_LINEARS = r"language\.blocks\.\d+\.(attn\.(q|k|v|out)|ff\.(gate|up|down))"


@dataclass(frozen=True)
class QwenLoraConfig:
    """The LoRA that is trained.

    Attributes:
        target_modules: regular expression on dotted paths: the linears that get an adapter; null: no LoRA. The vision
            tower's are ``vision.blocks.0.ff.up`` and so on.
        rank: its rank.
        alpha: its strength is alpha / rank; null is the rank.
    """

    target_modules: str | None = LANGUAGE_LINEARS
    rank: Rank = 16
    alpha: Positive | None = 32.0

    def __post_init__(self) -> None:
        require_ranges(self, "lora")
        require_pattern("lora.target_modules", self.target_modules)


@dataclass(frozen=True)
class QwenDataConfig:
    """The sizes and the loading of samples.

    Attributes:
        max_tokens: of a sample, with its images; all are padded to it, and longer ones are skipped.
        max_pixels: of an image; larger ones are scaled down.
        max_ratio: of the sides of an image; images beyond it are skipped.
        workers: processes that read and decode; null: all cores but one. 0 uses the run's own process.
        prefetch: batches made in advance.
        skip_limit: more unusable records than this in one process end the run.
    """

    max_tokens: Annotated[int, Range(8, 2**20)] = 512
    max_pixels: Pixels = 448 * 448
    max_ratio: Ratio = 4.0
    workers: Workers | None = None
    prefetch: SmallCount = 4
    skip_limit: CountOrZero = 1000

    def __post_init__(self) -> None:
        require_ranges(self, "data")


@dataclass(frozen=True, kw_only=True)
class QwenRunConfig(CommonConfig):
    """Trains a Qwen2.5-VL.

    Attributes:
        model: the Qwen2.5-VL it begins with: a folder or a Hub id.
        trainable_parameters: regular expression on dotted parameter paths of the model: these are trained too (".*"
            without a LoRA is a full fine-tune; ``vision.*`` the vision tower).
    """

    data: QwenDataConfig
    lora: QwenLoraConfig = field(default_factory=QwenLoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora.target_modules is None and self.trainable_parameters is None:
            raise InputError("lora.target_modules and trainable_parameters are null: give one of them")
