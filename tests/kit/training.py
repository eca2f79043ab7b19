"""A few steps of training on a tiny model, without a data loader."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rflow_jax.parallel.mesh import MeshConfig, make_mesh, put_batch
from rflow_jax.training.config import LoraConfig, OptimizerConfig
from rflow_jax.training.corrector.step import ENCODERS, StepInputs, StepSpec, TokenShape, make_encode, make_step
from rflow_jax.training.optimizers import make_optimizer
from rflow_jax.training.partition import load_trainable_model
from rflow_jax.training.train_state import init_state

GOLDEN = Path(__file__).parents[1] / "golden"
BATCH, TEXT, STEPS = 8, 16, 2


def batch(step: int) -> tuple[np.ndarray, ...]:
    """The fields of a step's inputs, on the host."""
    rng = np.random.default_rng(step)
    first = step * BATCH
    return (
        rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8),
        rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8),
        rng.integers(0, 50, (BATCH, 77)).astype(np.int32),
        rng.integers(0, 50, (BATCH, TEXT)).astype(np.int32),
        np.arange(first, first + BATCH, dtype=np.uint32),
    )


class TrainingRun:
    """A few steps of training on a tiny model."""

    def __init__(
        self,
        mesh: MeshConfig,
        devices: int,
        lora: LoraConfig = LoraConfig(rank=4),
        parameters: str | None = None,
        scan_blocks: bool = False,
        **how,
    ):
        self.mesh = make_mesh(mesh, jax.devices()[:devices])
        loaded = {"seed": 0, "dtype": "float32", "mesh": self.mesh, "scan_blocks": scan_blocks}
        self.trained = load_trainable_model(str(GOLDEN / "pipeline"), lora, parameters, **loaded)
        optimizer = make_optimizer(OptimizerConfig("adamw", lr=1e-2))
        recipe = StepSpec(0, jnp.float32, TokenShape(TEXT, (2, 2), (1, 1)), **how)
        self.state, shardings = init_state(self.trained.trainable, optimizer, self.mesh)
        self._encode = make_encode(self.trained.bundle, recipe, self.mesh)
        self._step = make_step(self.trained.graph, optimizer, recipe, self.mesh, shardings)
        self._start = jax.device_get(self.state)  # a step gives its state's buffers away
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)

    def restart(self) -> TrainingRun:
        """This run at its first step again, with the programs that it compiled."""
        self.state = jax.device_put(self._start, self._shardings)
        return self

    def losses(self, steps: range = range(STEPS)) -> np.ndarray:
        """[steps, 2]: losses and norms of the gradients."""
        weights, found = self.trained.bundle.weights, []
        encoders = {name: weights[name] for name in ENCODERS}
        for step in steps:
            inputs = StepInputs(*put_batch(self.mesh, batch(step)))
            examples = self._encode(encoders, inputs)
            with jax.transfer_guard("disallow"):
                self.state, report = self._step(self.state, self.trained.frozen, examples, inputs.numbers)
            found.append(jax.device_get((report.loss, report.gradient_norm)))
        return np.asarray(found)
