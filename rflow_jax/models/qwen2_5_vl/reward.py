"""Qwen2.5-VL with a reward head: one number (or a few) for a picture and its prompt."""

from __future__ import annotations

from typing import Any, Literal

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


class SpecialTokenEmbedding(nnx.Module):
    """A table of vectors, and apart from it the vector of one token, which can move while the table stays.

    Args:
        embedding: the table.
        token: the token, which may have a row in the table or not.
        special: [1, d], its vector.
    """

    def __init__(self, embedding: nnx.Param, token: int, special: Float[Array, "1 d"]):
        self.embedding, self.token = embedding, token
        self.special = nnx.Param(special)

    def __call__(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        table = self.embedding[...]
        rows = table[jnp.minimum(ids, table.shape[0] - 1)]
        return jnp.where((ids == self.token)[..., None], self.special[...].astype(rows.dtype), rows)


def reward_model_of(
    base: Qwen25VL, kernel: Float[Array, "d k"], token: int | None, special: Float[Array, "1 d"] | None
) -> RewardModel:
    """A reward model on a language model, whose parameters it takes over and whose head it leaves out.

    Args:
        kernel: of the reward head.
        token: the special token; None: there is none.
        special: its vector.
    """
    model = abstract_reward_model(base.config, kernel.shape[1], kernel.dtype)
    model.vision, model.language = base.vision, base.language
    model.language.head = nnx.data(None)
    model.reward.kernel.set_value(kernel)
    if token is not None and special is not None:
        table: Any = SpecialTokenEmbedding(base.language.embed.embedding, token, special)
        model.language.embed = table
    return model


def abstract_reward_model(config: Qwen25VLConfig, outputs: int = 1, dtype: Dtype = jnp.float32) -> RewardModel:
    """The network without numbers, to be filled by a loader or counted."""
    return abstract(lambda rngs: RewardModel(config, outputs, rngs=rngs, dtype=dtype))
