"""The encoder of T5 v1.1, FLUX's text encoder for long prompts."""

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
from rflow_jax.models.layers import Embedding, Linear, RMSNorm, SelfAttention
from rflow_jax.models.options import require_kind
from rflow_jax.models.partitioning import BATCH, constrain
from rflow_jax.typing import Array, Bool, Float, Int

# The defaults of Transformers for values missing in config.json; not T5-XXL's values.
_DEFAULTS: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}


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
        return cls(**_DEFAULTS | {key: config[key] for key in cls.__dataclass_fields__ if key in config})


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
