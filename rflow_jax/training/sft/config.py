"""The configuration of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from rflow_jax.errors import InputError
from rflow_jax.training.qwen.config import QwenDataConfig, QwenRunConfig
from rflow_jax.utils.ranges import Count, CountOrZero, Range, require_ranges


@dataclass(frozen=True)
class ChatDataConfig(QwenDataConfig):
    """Chats with images.

    Attributes:
        chats: file of JSON lines: ``messages``, each with ``role`` (system, user or assistant) and ``content``, in
            which ``<image>`` stands for an image, and ``images`` (relative to the file).
        max_images: of a chat; chats with more are skipped.
        max_tokens: of a chat, with its images; all are padded to it, and longer ones are skipped.
    """

    chats: str = ""
    max_images: CountOrZero = 1
    max_tokens: Annotated[int, Range(8, 2**20)] = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.chats:
            raise InputError("data.chats: name a file of JSON lines")


@dataclass(frozen=True)
class ChatValidationConfig:
    """Validation on chats that are held out.

    Attributes:
        chats: as in ``data``; null: no validation.
        every: steps between two; there is one before the first step too.
        records: how many, from the first on.
    """

    chats: str | None = None
    every: Count = 500
    records: Count = 256

    def __post_init__(self) -> None:
        require_ranges(self, "validation")


@dataclass(frozen=True)
class SftTaskConfig:
    """The export of a checkpoint.

    Attributes:
        merge: write a whole folder of Transformers with the LoRA added to the weights, instead of the adapter alone;
            always done if parameters of the model itself are trained.
    """

    merge: bool = False


@dataclass(frozen=True, kw_only=True)
class SftRunConfig(QwenRunConfig):
    """Fine-tunes a Qwen2.5-VL on chats.

    Attributes:
        sft: what is exported at a checkpoint.
        train: the steps; a sample is a chat.
        validation: evaluation on held-out chats.
    """

    task: Literal["sft"] = "sft"
    data: ChatDataConfig
    sft: SftTaskConfig = field(default_factory=SftTaskConfig)
    validation: ChatValidationConfig = field(default_factory=ChatValidationConfig)
