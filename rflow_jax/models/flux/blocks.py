"""The two kinds of FLUX blocks, each defined once for plain and for conditioned generation.

Tokens that share weights lie in one array, so that one product serves them: image and condition in a double-stream
block, all three in a single-stream block. Modulation vectors lie in rows too, [b, k, d]: row 0 for text
and image, row 1 (if there is a condition) for the condition. A LoRA acts on the condition's rows of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.attention import AttentionImpl, attend
from rflow_jax.models.flux.config import ConditionFlags, FluxConfig
from rflow_jax.models.flux.embeddings import Rope, apply_rope
from rflow_jax.models.layers import ALL_ROWS, Linear, LoraRows, RMSNorm, layer_norm
from rflow_jax.models.partitioning import BATCH, HEADS, SEQUENCE, TENSOR, TOKENS, constrain, has_axis
from rflow_jax.models.remat import Remat
from rflow_jax.typing import Array, Float

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Context:
    """What every block is told besides its tokens.

    Attributes:
        rope: angles of [text, image, condition].
        n_condition: condition tokens, the last ones of every array that holds some; 0: no condition.
        flags: how the condition takes part.
        condition_scale: scalar; its logarithm is added to the attention logits between the condition and the rest.
        attention: see :func:`rflow_jax.models.attention.attend`.
        remat: what the backward pass computes again, see :data:`rflow_jax.models.remat.Remat`.
    """

    rope: Rope
    n_condition: int = 0
    flags: ConditionFlags = ConditionFlags()
    condition_scale: Array | None = None
    attention: AttentionImpl = "auto"
    remat: Remat = "none"

    def lora_rows(self, tokens: int) -> LoraRows:
        """The rows of an array that ends in the condition's on which the LoRA acts."""
        if self.flags.latent_lora:
            return ALL_ROWS
        return slice(tokens - self.n_condition, None) if self.n_condition else None

    @property
    def lora_vectors(self) -> LoraRows:
        """The same for modulation vectors [b, k, d]."""
        if self.flags.latent_lora:
            return ALL_ROWS
        return slice(1, None) if self.n_condition else None

    @property
    def lora_text(self) -> LoraRows:
        """The same for text tokens: a condition-only LoRA never acts on them."""
        return ALL_ROWS if self.flags.latent_lora else None

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """Attention over [text, image, condition] as the flags say."""
        c = self.n_condition
        if c and not self.flags.union_cond_attn:
            parts = [(x[:, :-c], x[:, -c:]) for x in (q, k, v)]
            rest, condition = (attend(*part, impl=self.attention) for part in zip(*parts, strict=True))
            return jnp.concatenate([rest, condition], axis=1)
        bias = None
        if c and self.condition_scale is not None:
            is_condition = jnp.arange(q.shape[1]) >= q.shape[1] - c
            across = is_condition[:, None] != is_condition[None, :]
            bias = jnp.where(across, jnp.log(self.condition_scale), 0.0).astype(q.dtype)[None, None]
        return attend(q, k, v, bias=bias, impl=self.attention)


def per_token(vector: Float[Array, "b k d"], tokens: int, n_condition: int) -> Float[Array, "b _ d"]:
    """Row 0 for every token but the last ``n_condition``, row 1 for these."""
    if vector.shape[1] == 1:
        return vector
    # A select between two broadcasts is fused into what reads it; a concatenation might be written out.
    is_condition = (jnp.arange(tokens) >= tokens - n_condition)[None, :, None]
    return jnp.where(is_condition, vector[:, 1:], vector[:, :1])


def per_token_chunks(modulation: Float[Array, "b k o"], chunks: int, tokens: int, n_condition: int) -> list[Array]:
    """The shifts, scales and gates in a modulation, each as :func:`per_token` gives it."""
    return [per_token(vector, tokens, n_condition) for vector in jnp.split(modulation, chunks, axis=-1)]


class Modulation(Linear):
    """silu(vector) -> ``chunks`` vectors of width d: shifts, scales and gates."""

    def __init__(self, d: int, chunks: int, *, rngs: nnx.Rngs, dtype: Dtype):
        super().__init__(d, chunks * d, rngs=rngs, dtype=dtype)
        self.chunks = chunks

    def __call__(self, x: Float[Array, "b k d"], lora: LoraRows = None) -> Float[Array, "b k o"]:
        # Every channel of these few vectors is wanted everywhere. Left to itself XLA cuts them, and computes wrong
        # gradients where a mesh has data, fsdp and tensor axes of more than one device (JAX 0.10.2).
        return constrain(super().__call__(jax.nn.silu(x), lora), BATCH)


def modulate(x: Float[Array, "b s d"], shift: Array, scale: Array) -> Float[Array, "b s d"]:
    """LayerNorm without parameters, then scale and shift; in float32."""
    y = layer_norm(x, NORM_EPS)
    return (y * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)


class QKV(nnx.Module):
    """Queries, keys and values of one stream: projected, q and k normed per head and turned."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        d, h = config.width, config.attention_head_dim
        self.heads = config.num_attention_heads
        self.q = Linear(d, d, rngs=rngs, dtype=dtype)
        self.k = Linear(d, d, rngs=rngs, dtype=dtype)
        self.v = Linear(d, d, rngs=rngs, dtype=dtype)
        self.norm_q = RMSNorm(h, eps=NORM_EPS, dtype=dtype)
        self.norm_k = RMSNorm(h, eps=NORM_EPS, dtype=dtype)

    def __call__(self, x: Float[Array, "b s d"], rope: Rope, lora: LoraRows) -> tuple[Array, Array, Array]:
        q, k, v = (self._heads(linear(x, lora)) for linear in (self.q, self.k, self.v))
        q, k = apply_rope(self.norm_q(q), rope), apply_rope(self.norm_k(k), rope)
        return _whole_sequence(q), _whole_sequence(k), _whole_sequence(v)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class FeedForward(nnx.Module):
    """linear, GELU (tanh form), linear."""

    def __init__(self, d: int, m: int, *, rngs: nnx.Rngs, dtype: Dtype):
        self.up = Linear(d, m, rngs=rngs, dtype=dtype)
        self.down = Linear(m, d, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b s d"], lora: LoraRows) -> Float[Array, "b s d"]:
        return self.down(jax.nn.gelu(self.up(x, lora), approximate=True), lora)


class Stream(nnx.Module):
    """One stream's half of a double-stream block."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        d = config.width
        self.mod = Modulation(d, 6, rngs=rngs, dtype=dtype)
        self.qkv = QKV(config, rngs=rngs, dtype=dtype)
        self.out = Linear(d, d, rngs=rngs, dtype=dtype)
        self.ff = FeedForward(d, config.mlp_width, rngs=rngs, dtype=dtype)

    def feed_forward(self, x: Array, shift: Array, scale: Array, gate: Array, lora: LoraRows) -> Array:
        return x + gate * self.ff(modulate(x, shift, scale), lora)


class DoubleModulation(NamedTuple):
    """What a double-stream block's two modulations give: shift, scale, gate of the attention, then of the rest."""

    image: Float[Array, "b k o"]
    text: Float[Array, "b 1 o"]


class DoubleBlock(nnx.Module):
    """Text and image (with the condition) each with their own weights, attending together."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        self.image = Stream(config, rngs=rngs, dtype=dtype)
        self.text = Stream(config, rngs=rngs, dtype=dtype)

    def modulation(self, vector: Float[Array, "b k d"], ctx: Context) -> DoubleModulation:
        """Depends on the time, the guidance and the pooled text alone, and not on any token."""
        return DoubleModulation(self.image.mod(vector, ctx.lora_vectors), self.text.mod(vector[:, :1], ctx.lora_text))

    def __call__(
        self, text: Float[Array, "b t d"], image: Float[Array, "b ic d"], modulation: DoubleModulation, ctx: Context
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b ic d"]]:
        """``image`` holds image tokens, then condition tokens."""
        t, c = text.shape[1], ctx.n_condition
        text_rope, image_rope = (Rope(*(part[rows] for part in ctx.rope)) for rows in (slice(t), slice(t, None)))
        text_mod = per_token_chunks(modulation.text, 6, t, 0)
        image_mod = per_token_chunks(modulation.image, 6, image.shape[1], c)
        rows = ctx.lora_rows(image.shape[1])

        text_qkv = self.text.qkv(modulate(text, *text_mod[:2]), text_rope, ctx.lora_text)
        image_qkv = self.image.qkv(modulate(image, *image_mod[:2]), image_rope, rows)
        joint = (jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, image_qkv, strict=True))
        attended = ctx.attend(*joint)
        attended_text, attended_image = (_merge_heads(part) for part in (attended[:, :t], attended[:, t:]))

        text = text + text_mod[2] * self.text.out(attended_text, ctx.lora_text)
        update = image_mod[2] * self.image.out(attended_image, rows)
        image = image + update
        if c and ctx.flags.add_cond_attn:
            image = image + jnp.pad(update[:, -c:], ((0, 0), (0, c), (0, 0)))
        text = self.text.feed_forward(text, text_mod[3], text_mod[4], text_mod[5], ctx.lora_text)
        image = self.image.feed_forward(image, image_mod[3], image_mod[4], image_mod[5], rows)
        return text, image


class SingleBlock(nnx.Module):
    """All tokens in one stream; attention and feed-forward part side by side."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        d, m = config.width, config.mlp_width
        self.mod = Modulation(d, 3, rngs=rngs, dtype=dtype)
        self.qkv = QKV(config, rngs=rngs, dtype=dtype)
        self.mlp = Linear(d, m, rngs=rngs, dtype=dtype)
        self.out = Linear(d + m, d, rngs=rngs, dtype=dtype)

    def modulation(self, vector: Float[Array, "b k d"], ctx: Context) -> Float[Array, "b k o"]:
        """shift, scale, gate; depends on the time, the guidance and the pooled text alone."""
        return self.mod(vector, ctx.lora_vectors)

    def __call__(
        self, x: Float[Array, "b s d"], modulation: Float[Array, "b k o"], ctx: Context
    ) -> Float[Array, "b s d"]:
        """``x`` holds text, image and condition tokens."""
        rows = ctx.lora_rows(x.shape[1])
        shift, scale, gate = per_token_chunks(modulation, 3, x.shape[1], ctx.n_condition)
        y = modulate(x, shift, scale)
        attended = _merge_heads(ctx.attend(*self.qkv(y, ctx.rope, rows)))
        hidden = jax.nn.gelu(self.mlp(y, rows), approximate=True)
        return x + gate * self.out(jnp.concatenate([attended, hidden], axis=-1), rows)


def _whole_sequence(x: Float[Array, "b s n h"]) -> Float[Array, "b s n h"]:
    """Tokens cut over the mesh are exchanged for heads before streams are joined: no join is then across devices."""
    return constrain(x, BATCH, None, HEADS) if has_axis(SEQUENCE) else x


def _merge_heads(x: Float[Array, "b s n h"]) -> Float[Array, "b s d"]:
    """Heads side by side; on a mesh that cuts tokens, each device has its own again."""
    x = x.reshape(*x.shape[:2], -1)
    return constrain(x, BATCH, TOKENS, (TENSOR,)) if has_axis(SEQUENCE) else x
