"""What reward training minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rflow_jax.models.attention import AttentionImpl
from rflow_jax.models.remat import Remat
from rflow_jax.training.qwen.rows import inputs_of
from rflow_jax.training.reward.batches import PairInputs
from rflow_jax.training.reward.losses import LossName, pair_accuracy, pair_losses
from rflow_jax.training.update import Metrics, Ratio
from rflow_jax.typing import Array, Float
from rflow_jax.vlm.qwen import Scoring, score
from rflow_jax.vlm.qwen_images import ImageRules


@dataclass(frozen=True)
class PairObjective:
    """(trainable, frozen, pairs) -> (loss, pair accuracy); an :data:`~rflow_jax.training.update.Objective`.

    Attributes:
        graph: of the reward model.
        unit: patches of a token.
    """

    graph: Any
    rules: ImageRules
    scoring: Scoring
    loss: LossName
    unit: int
    attention: AttentionImpl = "auto"
    remat: Remat = "none"

    def __call__(self, trainable: Any, frozen: Any, pairs: PairInputs) -> tuple[Float[Array, ""], Metrics]:
        rewards = self.rewards(trainable, frozen, pairs)
        loss = jnp.mean(pair_losses(self.loss, rewards, jnp.asarray(pairs.scores), jnp.asarray(pairs.labels)))
        return loss, {"accuracy": Ratio(*pair_accuracy(rewards, jnp.asarray(pairs.labels)))}

    def rewards(self, trainable: Any, frozen: Any, pairs: PairInputs) -> Float[Array, "b 2"]:
        """Rewards of both pictures of each pair."""
        model = nnx.merge(self.graph, trainable, frozen)
        # All pictures are rows of one batch.
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs.rows)
        inputs = inputs_of(rows, self.unit)
        found = score(model, self.rules, self.scoring, inputs, attention=self.attention, remat=self.remat)
        return found[:, 0].reshape(-1, 2)
