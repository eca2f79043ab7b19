"""FLUX's text encoders: CLIP's text model, which encodes a prompt into one vector, and T5 v1.1's, for long prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.layers import Embedding, LayerNorm, Linear, RMSNorm, SelfAttention
from rflow_jax.models.options import require_heads, require_kind
from rflow_jax.models.partitioning import BATCH, constrain
from rflow_jax.typing import Array, Bool, Float, Int

# Old configurations have 2 instead of the right id; the end token is then a prompt's highest id.
LEGACY_EOS_TOKEN_ID = 2


_CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "eos_token_id": 49_407,
}


@dataclass(frozen=True)
class ClipLayersConfig:
    """Sizes of the blocks, in the names of Transformers' ``config.json``."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def require_usable(self, source: str) -> None:
        """Raises InputError, which begins with ``source``, for sizes that no layer can have."""
        require_heads(self.hidden_size, self.num_attention_heads, source)
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(f"{source}: hidden_act {self.hidden_act!r} is not supported, only {known}")


@dataclass(frozen=True)
class ClipTextConfig(ClipLayersConfig):
    """Sizes, in the names of Transformers' ``config.json``; the defaults are those of FLUX.1's CLIP-L."""

    vocab_size: int = 49_408
    max_position_embeddings: int = 77
    eos_token_id: int = LEGACY_EOS_TOKEN_ID

    def __post_init__(self) -> None:
        self.require_usable("text_encoder config")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ClipTextConfig:
        """From the content of ``text_encoder/config.json``; raises InputError for another network."""
        require_kind(config, "model_type", "clip_text_model", "text_encoder config")
        return cls(**_CLIP_DEFAULTS | {key: config[key] for key in cls.__dataclass_fields__ if key in config})


class ClipTextEncoder(nnx.Module):
    """Token ids -> hidden states and one vector per prompt.

    It computes in the dtype of the embedding, norms and softmax in float32.

    Source: Radford et al., "Learning Transferable Visual Models"; ``CLIPTextModel`` of Transformers.
    """

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d = config.hidden_size
        self.config = config
        self.embed = Embedding(config.vocab_size, d, rngs=rngs, dtype=dtype)
        self.positions = Embedding(config.max_position_embeddings, d, rngs=rngs, dtype=dtype)
        self.blocks = nnx.List(ClipBlock(config, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers))
        self.final_norm = LayerNorm(d, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, ids: Int[Array, "b t"]) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
        """(hidden states after the last norm, those of each prompt's end token).

        Raises:
            InputError: more tokens than positions.
        """
        length = ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise InputError(f"{length} CLIP tokens; the model has {self.config.max_position_embeddings} positions")
        causal = jnp.tril(jnp.ones((1, 1, length, length), bool))
        x = constrain(self.embed(ids) + self.positions(jnp.arange(length)), BATCH)
        for block in self.blocks:
            x = constrain(block(x, causal), BATCH)
        x = self.final_norm(x)
        ends = end_positions(ids, self.config.eos_token_id)
        return x, jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]


class ClipBlock(nnx.Module):
    """Attention, then a feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: ClipLayersConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d, heads = config.hidden_size, config.num_attention_heads
        head_dim = d // heads
        self.attn_norm = LayerNorm(d, eps=config.layer_norm_eps, dtype=dtype)
        self.attn = SelfAttention(d, heads, head_dim, scale=head_dim**-0.5, use_bias=True, rngs=rngs, dtype=dtype)
        self.ff_norm = LayerNorm(d, eps=config.layer_norm_eps, dtype=dtype)
        self.ff = FeedForward(d, config.intermediate_size, config.hidden_act, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b t d"], mask: Array | None = None) -> Float[Array, "b t d"]:
        x = x + self.attn(self.attn_norm(x), mask=mask)
        return x + self.ff(self.ff_norm(x))


class FeedForward(nnx.Module):
    """``down(activation(up(x)))``."""

    def __init__(self, d: int, m: int, activation: str, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.activation = activation
        self.up = Linear(d, m, rngs=rngs, dtype=dtype)
        self.down = Linear(m, d, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


def end_positions(ids: Int[Array, "b t"], eos_token_id: int) -> Int[Array, " b"]:
    """The position of each prompt's end token; 0 for a prompt without one.

    With the legacy id 2 it is the first position of the highest id: wrong for vocabularies with tokens added
    after the end token, and what such checkpoints have always been used with.
    """
    if eos_token_id == LEGACY_EOS_TOKEN_ID:
        return jnp.argmax(ids, axis=-1)
    return jnp.argmax(ids == eos_token_id, axis=-1)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": _gelu}


# The defaults of Transformers for values missing in config.json; not T5-XXL's values.
_T5_DEFAULTS: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}


@dataclass(frozen=True)
class T5Config:
    """Sizes, in the names of Transformers' ``config.json``; the defaults are T5 v1.1 XXL's."""

    vocab_size: int = 32_128
    d_model: int = 4096
    d_kv: int = 64  # width of a head
    d_ff: int = 10_240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> T5Config:
        """From the content of ``text_encoder_2/config.json``; raises InputError for another network."""
        require_kind(config, "model_type", "t5", "text_encoder_2 config")
        if (act := config.get("feed_forward_proj", "relu")) != "gated-gelu":
            raise InputError(f"text_encoder_2 config: feed_forward_proj {act!r}; T5 v1.1 has 'gated-gelu'")
        return cls(**_T5_DEFAULTS | {key: config[key] for key in cls.__dataclass_fields__ if key in config})


class T5Encoder(nnx.Module):
    """Token ids -> hidden states. It computes in the dtype of the embedding, norms and softmax in float32.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning", and its version 1.1 (gated GELU, no
    dropout); ``T5EncoderModel`` of Transformers.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.d_model, rngs=rngs, dtype=dtype)
        self.position_bias = Embedding(config.relative_attention_num_buckets, config.num_heads, rngs=rngs, dtype=dtype)
        self.blocks = nnx.List(T5Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

    def __call__(self, ids: Int[Array, "b t"], mask: Bool[Array, "b t"] | None = None) -> Float[Array, "b t d"]:
        """The hidden states after the last norm.

        Args:
            mask: True at the tokens that may be attended to. FLUX passes none: its padding takes part.
        """
        # Added to the scores of every block, by the distance from query to key.
        positions, config = np.arange(ids.shape[1]), self.config
        distances = positions[None, :] - positions[:, None]
        num_buckets, most = config.relative_attention_num_buckets, config.relative_attention_max_distance
        buckets = jnp.asarray(relative_buckets(distances, num_buckets, most))
        bias = self.position_bias(buckets).astype(jnp.float32).transpose(2, 0, 1)
        visible = None if mask is None else mask[:, None, None, :]
        x = constrain(self.embed(ids), BATCH)
        for block in self.blocks:
            x = constrain(block(x, bias, visible), BATCH)
        return self.final_norm(x)


class T5Block(nnx.Module):
    """Attention, then a gated feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        eps = config.layer_norm_epsilon
        self.attn_norm = RMSNorm(config.d_model, eps=eps, dtype=dtype)
        self.attn = SelfAttention(
            config.d_model,
            config.num_heads,
            config.d_kv,
            scale=1.0,  # the usual 1 / sqrt(head dimension) is part of T5's initialisation
            use_bias=False,
            rngs=rngs,
            dtype=dtype,
        )
        self.ff_norm = RMSNorm(config.d_model, eps=eps, dtype=dtype)
        self.ff = GatedFeedForward(config.d_model, config.d_ff, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b t d"], bias: Float[Array, "n t t"], mask: Array | None
    ) -> Float[Array, "b t d"]:
        x = x + self.attn(self.attn_norm(x), bias=bias, mask=mask)
        return x + self.ff(self.ff_norm(x))


class GatedFeedForward(nnx.Module):
    """``down(gelu(gate(x)) * up(x))`` with the tanh form of GELU, and no biases."""

    def __init__(self, d: int, m: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.gate = Linear(d, m, use_bias=False, rngs=rngs, dtype=dtype)
        self.up = Linear(d, m, use_bias=False, rngs=rngs, dtype=dtype)
        self.down = Linear(m, d, use_bias=False, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


def relative_buckets(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance (key's position minus query's).

    Half of the buckets are for keys after the query. Of each half, one half is for single distances; the
    other grows logarithmically up to ``max_distance`` and contains all beyond.
    """
    half = buckets // 2
    exact = half // 2
    far = np.abs(distance)
    # float32, as in the checkpoints' own code: at powers of two the rounding decides the bucket.
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    logarithmic = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, np.minimum(logarithmic, half - 1))
