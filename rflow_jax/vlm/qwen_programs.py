"""The programs of Qwen2.5-VL: a batch of inputs -> rewards, or -> text; compiled once for each padded size."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from rflow_jax.models.layers import ALL_ROWS
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.models.qwen2.generation import Decoding, GeneratedTokens, Prompts, generate
from rflow_jax.models.qwen2_5_vl.config import RewardToken
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, RewardModel
from rflow_jax.parallel.programs import shared_jit
from rflow_jax.typing import Array, Bool, Float, Int
from rflow_jax.vlm.qwen_batching import QwenInputs
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, normalised


@dataclass(frozen=True)
class Scoring:
    """The definition of a reward; hashable, as a program's static argument.

    Attributes:
        token, special: see :meth:`rflow_jax.models.qwen2_5_vl.model.RewardModel.rewards`.
        mrope: multimodal rotary positions. The original counts all tokens alike on all axes, pictures' too.
        lora: whether an unmerged adapter acts.
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


@shared_jit(static_argnums=(0, 1, 2), static_argnames=("attention",))
def rewards(
    graph: nnx.GraphDef,
    rules: ImageProcessorConfig,
    scoring: Scoring,
    state: nnx.State,
    inputs: QwenInputs,
    *,
    attention: AttentionImpl = "auto",
) -> Float[Array, "b k"]:
    """Rewards of a batch, before any normalisation."""
    return score(nnx.merge(graph, state), rules, scoring, inputs, attention=attention)


def score(
    model: RewardModel,
    rules: ImageProcessorConfig,
    scoring: Scoring,
    inputs: QwenInputs,
    *,
    attention: AttentionImpl = "auto",
    remat: Remat = "none",
) -> Float[Array, "b k"]:
    """As :func:`rewards`, within a larger program; ``remat`` as in training."""
    x = embed(model, rules, inputs, lora=scoring.lora, attention=attention)
    hidden = hidden_states(model, x, inputs, scoring.mrope, lora=scoring.lora, attention=attention, remat=remat)
    ids, lengths = jnp.asarray(inputs.ids), jnp.asarray(inputs.lengths)
    return model.rewards(hidden, ids, lengths, token=scoring.token, special=scoring.special)


@shared_jit(static_argnums=(0, 1), static_argnames=("attention",))
def first_tokens(
    graph: nnx.GraphDef,
    rules: ImageProcessorConfig,
    state: nnx.State,
    inputs: QwenInputs,
    tokens: Int[Array, " k"],
    *,
    attention: AttentionImpl = "auto",
) -> Float[Array, "b k"]:
    """Log-probabilities, float32, that the answer to a chat begins with each of these tokens."""
    model: Qwen25VL = nnx.merge(graph, state)
    hidden = hidden_states(model, embed(model, rules, inputs, attention=attention), inputs, True, attention=attention)
    last = jnp.take_along_axis(hidden, (jnp.asarray(inputs.lengths) - 1)[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(model.language.logits(last).astype(jnp.float32))[:, tokens]


@shared_jit(static_argnums=(0, 1, 2), static_argnames=("attention",))
def texts(
    graph: nnx.GraphDef,
    rules: ImageProcessorConfig,
    decoding: Decoding,
    state: nnx.State,
    inputs: QwenInputs,
    keys: Array | None = None,
    *,
    attention: AttentionImpl = "auto",
) -> GeneratedTokens:
    """Tokens that continue every chat of a batch.

    Args:
        keys: random keys, one per row; needed if tokens are drawn.
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
