"""The configuration of reward training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import RewardToken
from rflow_jax.training.qwen.config import QwenDataConfig, QwenRunConfig
from rflow_jax.utils.ranges import Count, Pixels, require_ranges

LossName = Literal["bt", "margin", "constant_margin", "scaled", "reg", "btt"]


@dataclass(frozen=True)
class RewardTaskConfig:
    """The reward head, and the loss on the rewards.

    Attributes:
        loss: ``bt`` (Bradley-Terry), ``margin``, ``constant_margin``, ``scaled``, ``reg`` (regression to people's
            scores) or ``btt`` (Bradley-Terry with ties).
        token: whose hidden state is scored: that of the special token <|VQ_reward|>, whose vector is trained too, of
            the ``last`` token, or the ``mean``.
        mrope: multimodal rotary positions; the original trains and scores without.
        prompt_file: the wording around ``$prompt``; null: the prompt alone.
        normalise: write mean and deviation of the held-out images' rewards into each export, to normalise a
            verifier's scores.
    """

    loss: LossName = "bt"
    token: RewardToken = "special"
    mrope: bool = False
    prompt_file: str | None = None
    normalise: bool = False


@dataclass(frozen=True)
class PairDataConfig(QwenDataConfig):
    """Pairs of images of one prompt; give ``pairs`` or ``path``.

    Attributes:
        pairs: file of JSON lines: ``prompt``, ``image_a``, ``image_b`` (relative to the file), ``label`` (A, B or
            same), and if people scored the images ``score_a`` and ``score_b``.
        path: of GenRef, whose good images are preferred to the bad ones: addresses as in the corrector's ``data``.
        format: of GenRef: ``tar`` or ``tfds``.
        cache: folder of the shards' indexes; null: ~/.cache/rflow_jax/genref.
        retry: timeouts and retries of servers.
    """

    pairs: str | None = None
    path: str | list[str] | None = None
    format: Literal["tar", "tfds"] = "tar"
    cache: str | None = None
    retry: RetryPolicy = RetryPolicy()
    max_pixels: Pixels = 240 * 320

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.pairs is None) == (self.path is None):
            raise InputError("data: give pairs (a file of JSON lines) or path (of GenRef), one of the two")


@dataclass(frozen=True)
class PairValidationConfig:
    """Validation on pairs that are held out; give ``pairs`` or ``path``, or neither for none.

    Attributes:
        pairs, path: as in ``data``.
        every: steps between two; there is one before the first step too.
        records: how many, from the first on.
    """

    pairs: str | None = None
    path: str | list[str] | None = None
    every: Count = 500
    records: Count = 512

    def __post_init__(self) -> None:
        if self.pairs is not None and self.path is not None:
            raise InputError("validation: give pairs or path, one of the two")
        require_ranges(self, "validation")


@dataclass(frozen=True, kw_only=True)
class RewardRunConfig(QwenRunConfig):
    """Trains an image verifier on pairs of images.

    Attributes:
        reward: the reward head and the loss.
        lora: the LoRA that is trained, besides the reward head and the special token.
        train: the steps; a sample is a pair.
        validation: evaluation on held-out pairs.
    """

    task: Literal["reward"] = "reward"
    data: PairDataConfig
    reward: RewardTaskConfig = field(default_factory=RewardTaskConfig)
    validation: PairValidationConfig = field(default_factory=PairValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward.normalise and self.validation.pairs is None and self.validation.path is None:
            raise InputError(
                "reward.normalise takes rewards of held-out pairs: give validation.pairs or validation.path"
            )
