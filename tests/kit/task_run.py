"""A few steps of a training task on a tiny model, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rflow_jax.parallel.mesh import make_mesh
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.train_state import StepMetrics, init_state


class TaskRun:
    """The task, its state, and steps of it.

    Args:
        task: made with a configuration and a mesh.
        told: what is kept of a step's report besides its loss and the norm of its gradient.
    """

    def __init__(
        self, task: Callable[..., Any], config: Any, devices: int, told: Callable[[StepMetrics], tuple[Any, ...]]
    ) -> None:
        self.mesh = make_mesh(config.mesh, jax.devices()[:devices])
        self.task, self._told = task(config, self.mesh), told
        optimizer = make_optimizer(config.optimizer)
        self.state, shardings = init_state(self.task.trainable, optimizer, self.mesh)
        self._step = self.task.make_step(optimizer, shardings)

    def losses(self, steps: int = 2) -> np.ndarray:
        """[steps, n]: losses, norms of the gradients, and what else is told."""
        found = []
        with self.task.open_loader(int(self.state.step), None) as loader, jax.default_matmul_precision("highest"):
            batches = iter(loader)
            for _ in range(steps):
                inputs = self.task.put(next(batches))
                with jax.transfer_guard("disallow"):
                    self.state, report = self._step(self.state, inputs)
                found.append(jax.device_get((report.loss, report.gradient_norm, *self._told(report))))
        return np.asarray(found)
