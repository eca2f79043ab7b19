"""Validation of a reward model: its loss and its accuracy on held-out pairs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.data.sources.preferences import PairSource
from rflow_jax.parallel.mesh import put_batch, replicated, traced_on
from rflow_jax.training.qwen.batches import Collator, first_usable
from rflow_jax.training.reward.config import LossName, PairValidationConfig
from rflow_jax.training.reward.loss import PairObjective, pair_accuracy, pair_losses


class PairValidation:
    """Held-out pairs, prepared once.

    Args:
        batch: pairs scored at once.

    Raises:
        InputError: no pair is usable.
    """

    def __init__(
        self,
        config: PairValidationConfig,
        source: PairSource,
        maker: Collator,
        objective: PairObjective,
        frozen: nnx.State,
        mesh: Mesh,
        batch: int,
    ):
        self.every = config.every
        self._loss: LossName = objective.loss
        self._mesh, self._frozen = mesh, frozen
        self._known: tuple[nnx.State, np.ndarray] | None = None
        examples = first_usable(source, maker, config.records)
        self._count = len(examples)
        self._batches = [maker.inputs(examples[k : k + batch], batch) for k in range(0, len(examples), batch)]
        self._rewards = jax.jit(traced_on(mesh, objective.rewards), out_shardings=replicated(mesh))

    def run(self, step: int, trainable: nnx.State) -> dict[str, float]:
        """``validation/loss``, and ``validation/accuracy`` if any pair has a preference."""
        rewards = jnp.asarray(self.rewards(trainable))
        labels, scores = (
            jnp.asarray(np.concatenate([getattr(batch, name) for batch in self._batches])[: self._count])
            for name in ("labels", "scores")
        )
        right, counted = pair_accuracy(rewards, labels)
        found = {"validation/loss": float(jnp.mean(pair_losses(self._loss, rewards, scores, labels)))}
        return found | ({"validation/accuracy": float(right / counted)} if counted else {})

    def moments(self, trainable: nnx.State) -> tuple[float, float]:
        """Mean and deviation of the rewards of all images."""
        rewards = self.rewards(trainable)
        return float(rewards.mean()), float(rewards.std())

    def rewards(self, trainable: nnx.State) -> np.ndarray:
        """[pairs, 2] float32."""
        if self._known is None or self._known[0] is not trainable:  # a step may be exported and validated
            # Every process reads all pairs, and keeps the rows of its devices.
            puts = (put_batch(self._mesh, batch, whole=True) for batch in self._batches)
            found = [self._rewards(trainable, self._frozen, put) for put in puts]
            self._known = trainable, np.concatenate([np.asarray(one) for one in found])[: self._count]
        return self._known[1]
