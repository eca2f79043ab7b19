"""One decoder block: grouped-query attention and a gated feed-forward."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.attention import AttentionImpl, attend
from rflow_jax.models.layers import Linear, LoraRows, RMSNorm
from rflow_jax.models.partitioning import BATCH, constrain
from rflow_jax.models.qwen2.cache import KeyValue
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2.rope import Rope, apply_rope
from rflow_jax.typing import Array, Bool, Float, Int


class Past(NamedTuple):
    """One layer's cache at a step."""

    cache: KeyValue
    place: Int[Array, ""]  # where the step's token is written
    visible: Bool[Array, "b s"]  # the places it sees


class Qwen2Block(nnx.Module):
    """Attention, then a gated feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d, eps = config.hidden_size, config.rms_norm_eps
        self.attn_norm = RMSNorm(d, eps=eps, dtype=dtype)
        self.attn = GroupedAttention(config, rngs=rngs, dtype=dtype)
        self.ff_norm = RMSNorm(d, eps=eps, dtype=dtype)
        self.ff = GatedFeedForward(d, config.intermediate_size, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rope: Rope,
        past: Past | None = None,
        lora: LoraRows = None,
        attention: AttentionImpl = "auto",
    ) -> tuple[Float[Array, "b t d"], KeyValue]:
        """The stream after the block, and the keys and values: of the given tokens, or the cache with one more."""
        attended, cache = self.attn(self.attn_norm(x), rope, past, lora, attention)
        x = as_samples(x + attended)
        return as_samples(x + self.ff(self.ff_norm(x), lora)), cache


class GroupedAttention(nnx.Module):
    """Causal self-attention in which several query heads share the keys and values of one head."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d, h = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q = Linear(d, self.heads * h, rngs=rngs, dtype=dtype)
        self.k = Linear(d, self.kv_heads * h, rngs=rngs, dtype=dtype)
        self.v = Linear(d, self.kv_heads * h, rngs=rngs, dtype=dtype)
        self.out = Linear(self.heads * h, d, use_bias=False, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rope: Rope,
        past: Past | None,
        lora: LoraRows,
        attention: AttentionImpl,
    ) -> tuple[Float[Array, "b t d"], KeyValue]:
        q, k, v = (layer(x, lora).reshape(*x.shape[:2], -1, rope_width(rope)) for layer in (self.q, self.k, self.v))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if past is None:
            attended = attend(q, k, v, causal=True, impl=attention)
            cache = KeyValue(k.swapaxes(1, 2), v.swapaxes(1, 2))
        else:
            cache = past.cache.written(k, v, past.place)
            attended = attend_one(q, cache, past.visible)
        return self.out(attended.reshape(*x.shape[:2], -1), lora), cache


class GatedFeedForward(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, d: int, m: int, *, use_bias: bool = False, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.gate = Linear(d, m, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.up = Linear(d, m, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.down = Linear(m, d, use_bias=use_bias, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b t d"], lora: LoraRows = None) -> Float[Array, "b t d"]:
        return self.down(jax.nn.silu(self.gate(x, lora)) * self.up(x, lora), lora)


def attend_one(q: Float[Array, "b 1 n h"], cache: KeyValue, visible: Bool[Array, "b s"]) -> Float[Array, "b 1 n h"]:
    """Attention of one token a sample over the visible places of a cache; scores and softmax in float32."""
    b, _, n, h = q.shape
    grouped = q.reshape(b, cache.k.shape[1], -1, h)
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, cache.k, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where(visible[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(cache.v.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, cache.v, preferred_element_type=jnp.float32)
    return out.reshape(b, 1, n, h).astype(q.dtype)


def as_samples(x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """The stream on a mesh: samples are cut, tokens and channels whole."""
    return constrain(x, BATCH)


def rope_width(rope: Rope) -> int:
    """Channels of a head."""
    return 2 * rope.cos.shape[-1]
