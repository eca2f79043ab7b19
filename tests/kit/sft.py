"""A few steps of fine-tuning on a tiny model, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from rflow_jax.parallel.mesh import make_mesh
from rflow_jax.training.config import LoopConfig
from rflow_jax.training.optimizers import OptimizerConfig, make_optimizer
from rflow_jax.training.qwen.config import QwenTrainableConfig
from rflow_jax.training.sft.config import ChatDataConfig, SftRunConfig
from rflow_jax.training.sft.task import Sft
from rflow_jax.training.update import init_state

BASE = Path(__file__).parents[1] / "golden" / "qwen" / "base"


def sft_config(
    chats: Path, *, base: Path = BASE, batch: int = 4, train: dict[str, Any] | None = None, **how: Any
) -> SftRunConfig:
    """A run on the recorded base model, float32 and small."""
    loop = LoopConfig(**{"steps": 4, "batch_size": batch, "remat": "none", "dtype": "float32"} | (train or {}))
    data = ChatDataConfig(chats=str(chats), max_tokens=270, max_pixels=100 * 100, max_images=2, workers=0)
    whole = {"data": data, "train": loop, "trainable": QwenTrainableConfig(rank=4, alpha=8.0)}
    whole |= {"optimizer": OptimizerConfig("adamw", lr=1e-2)} | how
    return SftRunConfig(model=str(base), out="", **whole)


class SftRun:
    """The task, its state, and steps of it."""

    def __init__(self, config: SftRunConfig, devices: int = 1):
        self.mesh = make_mesh(config.mesh, jax.devices()[:devices])
        self.task = Sft(config, self.mesh)
        optimizer = make_optimizer(config.optimizer)
        self.state, shardings = init_state(self.task.trainable, optimizer, self.mesh)
        self._step = self.task.make_step(optimizer, shardings)

    def losses(self, steps: int = 2) -> np.ndarray:
        """[steps, 2]: losses and norms of the gradients."""
        found = []
        with self.task.open_loader(int(self.state.step), None) as loader, jax.default_matmul_precision("highest"):
            batches = iter(loader)
            for _ in range(steps):
                inputs = self.task.put(next(batches))
                with jax.transfer_guard("disallow"):
                    self.state, report = self._step(self.state, inputs)
                found.append(jax.device_get((report.loss, report.gradient_norm)))
        return np.asarray(found)
