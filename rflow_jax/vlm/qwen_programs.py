"""The programs of Qwen2.5-VL: a batch of inputs -> rewards, or -> text; compiled once for each padded size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rflow_jax.models.layers import ALL_ROWS
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.models.qwen2.generation import Decoding, GeneratedTokens, Prompts, generate
from rflow_jax.models.qwen2_5_vl.config import RewardToken
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, RewardModel
from rflow_jax.typing import Array, Bool, Float
from rflow_jax.vlm.qwen_batching import QwenInputs
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, normalised


@dataclass(frozen=True)
class Scoring:
    """How a reward is taken; hashable, as a program's static argument.

    Attributes:
        token, special: see :meth:`rflow_jax.models.qwen2_5_vl.model.RewardModel.rewards`.
        mrope: multimodal rotary positions. The original counts its tokens on all axes alike, pictures' too.
        lora: whether an adapter that was kept apart acts.
    """

    token: RewardToken
    special: int | None = None
    mrope: bool = False
    lora: bool = True


def embed(
    model: Qwen25VL,
    rules: ImageProcessorConfig,
    inputs: QwenInputs,
    *,
    lora: bool = True,
    attention: AttentionImpl = "auto",
) -> Float[Array, "b t d"]:
    """Embeddings of a batch, pictures in their places."""
    patches = None if inputs.patches is None else normalised(jnp.asarray(inputs.patches), rules)
    places = None if inputs.places is None else jnp.asarray(inputs.places)
    rows = ALL_ROWS if lora else None
    return model.embed(jnp.asarray(inputs.ids), patches, inputs.layout, places, lora=rows, attention=attention)


def hidden_states(
    model: Qwen25VL,
    x: Float[Array, "b t d"],
    inputs: QwenInputs,
    mrope: bool | Bool[Array, ""],
    *,
    lora: bool = True,
    attention: AttentionImpl = "auto",
    remat: Remat = "none",
) -> Float[Array, "b t d"]:
    """The hidden states of embeddings after the last norm; ``mrope`` and ``lora`` as in :class:`Scoring`."""
    plain = jnp.arange(x.shape[1], dtype=jnp.int32)
    positions = jnp.where(mrope, jnp.asarray(inputs.positions), plain)
    return model.language(x, positions, lora=ALL_ROWS if lora else None, attention=attention, remat=remat)


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("attention",))
def rewards(
    graph: Any,
    rules: ImageProcessorConfig,
    how: Scoring,
    state: Any,
    inputs: QwenInputs,
    *,
    attention: AttentionImpl = "auto",
) -> Float[Array, "b k"]:
    """Rewards of a batch, before any normalisation."""
    return score(nnx.merge(graph, state), rules, how, inputs, attention=attention)


def score(
    model: RewardModel,
    rules: ImageProcessorConfig,
    how: Scoring,
    inputs: QwenInputs,
    *,
    attention: AttentionImpl = "auto",
    remat: Remat = "none",
) -> Float[Array, "b k"]:
    """Rewards of a batch, for a program that does more with them; ``remat`` as in training."""
    x = embed(model, rules, inputs, lora=how.lora, attention=attention)
    hidden = hidden_states(model, x, inputs, how.mrope, lora=how.lora, attention=attention, remat=remat)
    return model.rewards(
        hidden, jnp.asarray(inputs.ids), jnp.asarray(inputs.lengths), token=how.token, special=how.special
    )


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("attention",))
def texts(
    graph: Any,
    rules: ImageProcessorConfig,
    decoding: Decoding,
    state: Any,
    inputs: QwenInputs,
    keys: Array | None = None,
    *,
    attention: AttentionImpl = "auto",
) -> GeneratedTokens:
    """Tokens that continue every chat of a batch.

    Args:
        keys: random keys, one a row; needed where tokens are drawn.
    """
    model: Qwen25VL = nnx.merge(graph, state)
    prompts = Prompts(
        embed(model, rules, inputs, attention=attention),
        jnp.asarray(inputs.positions),
        jnp.asarray(inputs.lengths),
        jnp.asarray(inputs.next_position),
        jnp.asarray(inputs.live),
        keys,
        jnp.asarray(inputs.ids),
    )
    return generate(model.language, prompts, decoding, lora=ALL_ROWS, attention=attention)
