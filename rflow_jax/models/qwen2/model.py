"""The Qwen2 language model: rotary positions of one or three axes, blocks, and the cache of generation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.attention import attend
from rflow_jax.models.layers import Embedding, Linear, LoraRows, RMSNorm, abstract, matmul
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.models.partitioning import BATCH, constrain
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.stack import apply_remat
from rflow_jax.typing import Array, Bool, Float, Int


class Rope(NamedTuple):
    """Cosines and sines of every token's rotary angles, float32; an angle turns channels i and i + h/2 of a head."""

    cos: Float[Array, "b s h2"]
    sin: Float[Array, "b s h2"]


def rope_of(
    positions: Int[Array, "b s"] | Int[Array, "3 b s"], head_dim: int, theta: float, sections: tuple[int, ...] = ()
) -> Rope:
    """Rotary angles of tokens.

    Args:
        positions: [b, s]; or [3, b, s], time, row and column of each token.
        head_dim: channels of a head.
        theta: base of the frequencies.
        sections: number of frequencies, from the highest, that each of the three axes turns.
    """
    # Rounded like PyTorch's: the power in float32, then its inverse.
    powers = np.power(np.float32(theta), np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    frequencies = (np.float32(1) / powers).astype(np.float32)
    position = positions.astype(jnp.float32)
    if positions.ndim == 2:
        angle = position[..., None] * frequencies
    else:
        axis = np.repeat(np.arange(len(sections)), sections)
        angle = jnp.moveaxis(position[axis], 0, -1) * frequencies
    return Rope(jnp.cos(angle), jnp.sin(angle))


def apply_rope(x: Float[Array, "b s n h"], rope: Rope) -> Float[Array, "b s n h"]:
    """Turns the channel pairs (i, i + h/2) of every head, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class KeyValue(NamedTuple):
    """Keys and values of one layer; heads before tokens, the layout of a step's products."""

    k: Float[Array, "b kv s h"]
    v: Float[Array, "b kv s h"]

    def grown(self, capacity: int) -> KeyValue:
        """Padded to ``capacity`` tokens."""
        more = ((0, 0), (0, 0), (0, capacity - self.k.shape[2]), (0, 0))
        return KeyValue(jnp.pad(self.k, more), jnp.pad(self.v, more))

    def written(self, k: Float[Array, "b 1 kv h"], v: Float[Array, "b 1 kv h"], slot: Int[Array, ""]) -> KeyValue:
        """With one token's keys and values written at a slot."""
        new = (x.swapaxes(1, 2).astype(self.k.dtype) for x in (k, v))
        pairs = zip(self, new, strict=True)
        return KeyValue(*(jax.lax.dynamic_update_slice_in_dim(old, one, slot, 2) for old, one in pairs))


class Cache(NamedTuple):
    """The state of generation between steps."""

    layers: tuple[KeyValue, ...]
    lengths: Int[Array, " b"]  # of the prompts
    padded: Int[Array, ""]  # length that the prompts were padded to: the first new token's slot
    made: Int[Array, ""]  # tokens made so far

    @property
    def slot(self) -> Int[Array, ""]:
        """The next token's slot."""
        return self.padded + self.made

    def visible(self) -> Bool[Array, "b s"]:
        """The slots that the next token attends to: its prompt, the tokens made so far, itself."""
        slots = jnp.arange(self.layers[0].k.shape[2])
        made = (slots >= self.padded) & (slots <= self.slot)
        return (slots < self.lengths[:, None]) | made


class KeyValueCache(NamedTuple):
    """One layer's cache at a step."""

    cache: KeyValue
    slot: Int[Array, ""]  # where the step's token is written
    visible: Bool[Array, "b s"]  # the slots it attends to


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
        past: KeyValueCache | None = None,
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
        past: KeyValueCache | None,
        lora: LoraRows,
        attention: AttentionImpl,
    ) -> tuple[Float[Array, "b t d"], KeyValue]:
        q, k, v = (layer(x, lora).reshape(*x.shape[:2], -1, rope_width(rope)) for layer in (self.q, self.k, self.v))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if past is None:
            attended = attend(q, k, v, causal=True, impl=attention)
            cache = KeyValue(k.swapaxes(1, 2), v.swapaxes(1, 2))
        else:
            cache = past.cache.written(k, v, past.slot)
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
    """Attention of one token per sample over the visible slots of a cache; scores and softmax in float32."""
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


Positions = Int[Array, "b t"] | Int[Array, "3 b t"]


class Qwen2(nnx.Module):
    """A decoder of embeddings; the caller provides embeddings and positions.

    Batches are padded on the right: attention is causal, so no real token sees the padding, whose own results are
    meaningless. It computes in the dtype of its input; norms, rotary angles and softmax in float32.

    Source: ``Qwen2ForCausalLM`` and the language model of ``Qwen2_5_VLForConditionalGeneration`` of Transformers.

    Args:
        head: whether it has a language head (models with tied embeddings need none).
    """

    def __init__(self, config: Qwen2Config, *, head: bool = True, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.blocks = nnx.List(Qwen2Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers))
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        own_head = head and not config.tie_word_embeddings
        self.head = nnx.data(
            Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs, dtype=dtype) if own_head else None
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Positions,
        *,
        lora: LoraRows = None,
        attention: AttentionImpl = "auto",
        remat: Remat = "none",
    ) -> Float[Array, "b t d"]:
        """The hidden states after the last norm.

        Args:
            x: embeddings, padded on the right.
            positions: [b, t]; or [3, b, t] (time, row, column) where the config has ``mrope_section``.
            lora: the tokens that adapters act on; None: none.
            remat: see :data:`rflow_jax.models.options.Remat`.
        """
        x, rope = as_samples(x), self.rope(positions)
        for block in self.blocks:
            x = apply_remat(lambda x, rope, block=block: block(x, rope, None, lora, attention)[0], remat)(x, rope)
        return self.final_norm(x)

    def prefill(
        self,
        x: Float[Array, "b t d"],
        positions: Positions,
        lengths: Int[Array, " b"],
        capacity: int,
        *,
        lora: LoraRows = None,
        attention: AttentionImpl = "auto",
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """As a call, and the cache for :meth:`step`.

        Args:
            lengths: tokens of each prompt before its padding.
            capacity: slots of the cache: the padded length plus the tokens to be made.
        """
        x, rope = as_samples(x), self.rope(positions)
        layers: list[KeyValue] = []
        for block in self.blocks:
            x, tokens = block(x, rope, None, lora, attention)
            layers.append(tokens.grown(capacity))
        zero = jnp.zeros((), jnp.int32)
        return self.final_norm(x), Cache(tuple(layers), lengths, zero + x.shape[1], zero)

    def step(
        self, x: Float[Array, "b 1 d"], positions: Positions, cache: Cache, *, lora: LoraRows = None
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """One more token per sample: its hidden state after the last norm, and the cache with it."""
        x, rope, slot, visible = as_samples(x), self.rope(positions), cache.slot, cache.visible()
        layers: list[KeyValue] = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, layer = block(x, rope, KeyValueCache(layer, slot, visible), lora)
            layers.append(layer)
        return self.final_norm(x), cache._replace(layers=tuple(layers), made=cache.made + 1)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Logits of the next token, float32."""
        if self.head is not None:
            return matmul(hidden, self.head.kernel.get_value(), dtype=jnp.float32)
        table = self.embed.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def rope(self, positions: Positions) -> Rope:
        """Rotary angles at these positions."""
        config = self.config
        return rope_of(positions, config.head_dim, config.rope_theta, config.mrope_section)


def abstract_qwen2(config: Qwen2Config, dtype: Dtype = jnp.float32, *, head: bool = True) -> Qwen2:
    """The network as shapes, to be filled by a loader or counted."""
    return abstract(lambda rngs: Qwen2(config, head=head, rngs=rngs, dtype=dtype))
