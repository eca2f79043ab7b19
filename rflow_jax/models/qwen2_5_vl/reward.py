"""Qwen2.5-VL with a reward head: one number (or a few) for a picture and its prompt."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.layers import Linear, abstract, matmul
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL
from rflow_jax.typing import Array, Float, Int

RewardToken = Literal["last", "mean", "special"]


class RewardModel(Qwen25VL):
    """The network without a language head, and a linear on its hidden states.

    Source: ``Qwen2VLRewardModelBT`` of ReflectionFlow's ``reward_modeling``.

    Args:
        outputs: numbers a picture gets.
    """

    def __init__(self, config: Qwen25VLConfig, outputs: int = 1, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        super().__init__(config, head=False, rngs=rngs, dtype=dtype)
        self.reward = Linear(config.language.hidden_size, outputs, use_bias=False, rngs=rngs, dtype=dtype)

    def rewards(
        self,
        hidden: Float[Array, "b t d"],
        ids: Int[Array, "b t"],
        lengths: Int[Array, " b"],
        *,
        token: RewardToken,
        special: int | None = None,
    ) -> Float[Array, "b k"]:
        """Rewards, float32.

        Args:
            hidden: after the last norm.
            lengths: tokens of each sample before its padding.
            token: whose hidden state is scored: the last one's, the special one's, or the mean over all but the last
                (which the original leaves out).
            special: the special token; each sample holds it once.
        """
        if token == "mean":
            counted = jnp.arange(ids.shape[1]) < jnp.maximum(lengths - 1, 1)[:, None]
            scores = self._score(hidden)
            return jnp.sum(jnp.where(counted[..., None], scores, 0), axis=1) / jnp.sum(counted, axis=1, keepdims=True)
        places = lengths - 1 if token == "last" else jnp.argmax(ids == special, axis=1)
        return self._score(jnp.take_along_axis(hidden, places[:, None, None], axis=1))[:, 0]

    def _score(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t k"]:
        return matmul(hidden, self.reward.kernel.get_value(), dtype=jnp.float32)


def abstract_reward_model(config: Qwen25VLConfig, outputs: int = 1, dtype: Dtype = jnp.float32) -> RewardModel:
    """The network without numbers, to be filled by a loader or counted."""
    return abstract(lambda rngs: RewardModel(config, outputs, rngs=rngs, dtype=dtype))
