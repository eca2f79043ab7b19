"""The configuration of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rflow_jax.errors import InputError
from rflow_jax.training.qwen.config import QwenDataConfig, QwenRunConfig
from rflow_jax.utils.checks import require_least


@dataclass(frozen=True)
class ChatDataConfig(QwenDataConfig):
    """Chats with images.

    Attributes:
        chats: file of JSON lines: ``messages``, each with ``role`` (system, user or assistant) and ``content``, in
            which ``<image>`` stands for an image, and ``images`` (relative to the file).
        max_images: of a chat; chats with more are skipped.
        max_tokens: of a chat, with its images; all are padded to it, and longer ones are skipped.
        max_pixels: of an image; larger ones are scaled down.
        max_ratio: of the sides of an image; images beyond it are skipped.
        workers: processes that read and decode; null: all cores but one. 0 uses the run's own process.
        prefetch: batches made in advance.
        skip_limit: more unusable records than this in one process end the run.
    """

    chats: str = ""
    max_images: int = 1
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.chats:
            raise InputError("data.chats: name a file of JSON lines")
        require_least(self, "data", max_images=0)


@dataclass(frozen=True)
class ChatValidationConfig:
    """Validation on chats that are held out.

    Attributes:
        chats: as in ``data``; null: no validation.
        every: steps between two; there is one before the first step too.
        records: how many, from the first on.
    """

    chats: str | None = None
    every: int = 500
    records: int = 256

    def __post_init__(self) -> None:
        require_least(self, "validation", every=1, records=1)


@dataclass(frozen=True)
class SftTaskConfig:
    """What is exported at a checkpoint.

    Attributes:
        merge: write a whole folder of Transformers with the LoRA added to the weights, instead of the adapter alone;
            always done if parameters of the model itself are trained.
    """

    merge: bool = False


@dataclass(frozen=True, kw_only=True)
class SftRunConfig(QwenRunConfig):
    """Fine-tunes a Qwen2.5-VL on chats.

    Attributes:
        task: what is trained.
        model: the Qwen2.5-VL it begins with: a folder or a Hub id.
        out: folder of the run.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        sft: what is exported at a checkpoint.
        lora: the LoRA that is trained.
        trainable_parameters: regular expression on dotted parameter paths of the model: these are trained too (".*"
            without a LoRA is a full fine-tune; ``vision.*`` the vision tower).
        optimizer: how it moves.
        train: the steps; a sample is a chat.
        mesh: how the devices are arranged.
        distributed: several processes as one run.
        data: what it is trained on.
        checkpoint: when the run is saved.
        validation: how it is tried on held-out chats.
        logging: how its progress is reported.
    """

    task: Literal["sft"] = "sft"
    data: ChatDataConfig
    sft: SftTaskConfig = field(default_factory=SftTaskConfig)
    validation: ChatValidationConfig = field(default_factory=ChatValidationConfig)
