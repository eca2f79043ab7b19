"""A few steps of fine-tuning on a tiny model, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rflow_jax.training.config import LoopConfig, OptimizerConfig
from rflow_jax.training.qwen.config import QwenLoraConfig
from rflow_jax.training.sft.config import ChatDataConfig, SftRunConfig
from rflow_jax.training.sft.task import Sft
from tests.kit.task_run import TaskRun

BASE = Path(__file__).parents[1] / "golden" / "qwen" / "base"


def sft_config(
    chats: Path, *, base: Path = BASE, batch: int = 4, train: dict[str, Any] | None = None, **how: Any
) -> SftRunConfig:
    """A run on the recorded base model, float32 and small."""
    loop = LoopConfig(**{"steps": 4, "batch_size": batch, "remat": "none", "dtype": "float32"} | (train or {}))
    data = ChatDataConfig(chats=str(chats), max_tokens=270, max_pixels=100 * 100, max_images=2, workers=0)
    whole = {"data": data, "train": loop, "lora": QwenLoraConfig(rank=4, alpha=8.0)}
    whole |= {"optimizer": OptimizerConfig("adamw", lr=1e-2)} | how
    return SftRunConfig(model=str(base), out="unused", **whole)


class SftRun(TaskRun):
    """Tells losses and norms of the gradients."""

    def __init__(self, config: SftRunConfig, devices: int = 1):
        super().__init__(Sft, config, devices, lambda report: ())
