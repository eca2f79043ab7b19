"""A few steps of reward training on a tiny model, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rflow_jax.training.config import LoopConfig, OptimizerConfig
from rflow_jax.training.qwen.config import QwenLoraConfig
from rflow_jax.training.reward.config import PairDataConfig, RewardRunConfig
from rflow_jax.training.reward.task import Reward
from tests.kit.task_run import TaskRun

BASE = Path(__file__).parents[1] / "golden" / "qwen" / "base"


def reward_config(pairs: Path, *, batch: int = 8, train: dict[str, Any] | None = None, **how: Any) -> RewardRunConfig:
    """A run on the recorded base model, float32 and small."""
    loop = LoopConfig(**{"steps": 4, "batch_size": batch, "remat": "none", "dtype": "float32"} | (train or {}))
    data = PairDataConfig(pairs=str(pairs), max_tokens=64, max_pixels=60 * 60, workers=0)
    whole = {"data": data, "train": loop, "lora": QwenLoraConfig(rank=4, alpha=8.0)}
    whole |= {"optimizer": OptimizerConfig("adamw", lr=1e-2)} | how
    return RewardRunConfig(model=str(BASE), out="unused", **whole)


class RewardRun(TaskRun):
    """Also tells the right pairs."""

    def __init__(self, config: RewardRunConfig, devices: int = 1):
        super().__init__(Reward, config, devices, lambda report: (report.metrics["accuracy"].total,))
