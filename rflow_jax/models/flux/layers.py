"""The layers of FLUX: rotary positions, time features, modulations, and both kinds of block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.attention import attend
from rflow_jax.models.flux.config import ConditionFlags, FluxConfig
from rflow_jax.models.layers import ALL_ROWS, Linear, LoraRows, RMSNorm, each_linear, layer_norm
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.models.partitioning import BATCH, HEADS, SEQUENCE, TENSOR, TOKENS, constrain, has_axis
from rflow_jax.typing import Array, Float

TIME_FEATURES = 256
TIME_SCALE = 1000.0  # the network was trained on times and guidances multiplied by this
MAX_PERIOD = 10_000.0


class Rope(NamedTuple):
    """Cosines and sines of every token's rotary angles, float32; one angle turns one pair of neighbouring channels."""

    cos: Float[Array, "s h2"]
    sin: Float[Array, "s h2"]


def rope_table(ids: np.ndarray, axes: tuple[int, ...], theta: float) -> Rope:
    """Rotary angles of tokens at the positions ``ids``.

    Computed on the host in float64: positions follow from the image sizes only, and the recordings' accuracy needs more
    than float32 angles.

    Args:
        ids: [s, axes] positions (0, row, column).
        axes: channels of a head that each axis turns, h in all.
        theta: base of the frequencies.
    """
    angles = []
    for position, channels in zip(np.asarray(ids, np.float64).T, axes, strict=True):
        frequencies = theta ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
        angles.append(np.outer(position, frequencies))
    angle = np.concatenate(angles, axis=-1)
    return Rope(jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))


def apply_rope(x: Float[Array, "b s n h"], rope: Rope) -> Float[Array, "b s n h"]:
    """Turns the channel pairs (0, 1), (2, 3), ... of every head, in float32."""
    # The pairs are reversed, not stacked anew: a reversal is fused with what is around it, a concatenation is not.
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = rope.cos[:, None, :, None], rope.sin[:, None, :, None]
    turned = pairs * cos + jnp.flip(pairs, axis=-1) * (sin * np.array([-1, 1], np.float32))
    return turned.reshape(x.shape).astype(x.dtype)


def time_frequencies() -> np.ndarray:
    """The [128] angular frequencies of the time features, float32.

    The angles are large, so the last bit of a frequency matters: rounded to float32 before and after the exponential,
    like PyTorch. PyTorch's own exponential is off the nearest number by one bit for a few of them, depending on the
    processor: at a guidance of 10 that bit moves a feature by 2e-4.
    """
    half = TIME_FEATURES // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(MAX_PERIOD)) / np.float32(half)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def time_features(t: Float[Array, "*b"]) -> Float[Array, "*b 256"]:
    """Sinusoidal features of times (or guidances) in the network's units, cosines first, float32."""
    angle = (t.astype(jnp.float32) * TIME_SCALE)[..., None] * time_frequencies()
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class MLPEmbedder(nnx.Module):
    """linear, SiLU, linear."""

    def __init__(self, d_in: int, d: int, *, rngs: nnx.Rngs, dtype: Dtype):
        self.linear_1 = Linear(d_in, d, rngs=rngs, dtype=dtype)
        self.linear_2 = Linear(d, d, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b k f"], lora: LoraRows = None) -> Float[Array, "b k d"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x, lora)), lora)


NORM_EPS = 1e-6


@dataclass(frozen=True)
class Context:
    """The arguments of every block besides its tokens.

    Attributes:
        rope: angles of [text, image, condition].
        n_condition: condition tokens, the last ones of every array that has some; 0: no condition.
        flags: of the condition branch.
        condition_scale: scalar; its logarithm is added to the attention logits between the condition and the rest.
        attention: see :func:`rflow_jax.models.attention.attend`.
        remat: see :data:`rflow_jax.models.options.Remat`.
    """

    rope: Rope
    n_condition: int = 0
    flags: ConditionFlags = ConditionFlags()
    condition_scale: Array | None = None
    attention: AttentionImpl = "auto"
    remat: Remat = "none"

    def lora_rows(self, tokens: int) -> LoraRows:
        """The rows that the LoRA acts on, in an array that ends in the condition's."""
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
        """The same for text or image tokens alone: a condition-only LoRA never acts on them."""
        return ALL_ROWS if self.flags.latent_lora else None

    def attend(self, q: Array, k: Array, v: Array) -> Array:
        """Attention over [text, image, condition] as the flags say.

        Args:
            q: of all tokens, or of the image's alone.
        """
        c = self.n_condition
        image_only = q.shape[1] < k.shape[1]
        if c and not self.flags.union_cond_attn:
            rest = attend(q if image_only else q[:, :-c], k[:, :-c], v[:, :-c], impl=self.attention)
            if image_only:
                return rest
            condition = attend(q[:, -c:], k[:, -c:], v[:, -c:], impl=self.attention)
            return jnp.concatenate([rest, condition], axis=1)
        bias = None
        if c and self.condition_scale is not None:
            is_condition = jnp.arange(k.shape[1]) >= k.shape[1] - c
            queries = jnp.zeros(q.shape[1], bool) if image_only else is_condition
            across = queries[:, None] != is_condition[None, :]
            bias = jnp.where(across, jnp.log(self.condition_scale), 0.0).astype(q.dtype)[None, None]
        return attend(q, k, v, bias=bias, impl=self.attention)


def per_token(vector: Float[Array, "b k d"], tokens: int, n_condition: int) -> Float[Array, "b _ d"]:
    """Row 0 for every token but the last ``n_condition``, row 1 for these."""
    if vector.shape[1] == 1:
        return vector
    # A select between two broadcasts is fused into its consumer; a concatenation might be written out.
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
        # Every device needs all channels of these few vectors. Otherwise XLA cuts them, and computes wrong gradients
        # on a mesh with data, fsdp and tensor axes of more than one device (JAX 0.10.2).
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
        q, k, v = each_linear((self.q, self.k, self.v), x, lora)
        return self.turned(q, k, v, rope, rope)

    def turned(self, q: Array, k: Array, v: Array, rope_q: Rope, rope_k: Rope) -> tuple[Array, Array, Array]:
        """The same from the three products; queries and keys may be of other tokens."""
        q, k, v = (y.reshape(*y.shape[:-1], self.heads, -1) for y in (q, k, v))
        q, k = apply_rope(self.norm_q(q), rope_q), apply_rope(self.norm_k(k), rope_k)
        return _whole_sequence(q), _whole_sequence(k), _whole_sequence(v)


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
    """The output of a double-stream block's two modulations: shift, scale, gate of the attention, then of the rest."""

    image: Float[Array, "b k o"]
    text: Float[Array, "b 1 o"]


class DoubleBlock(nnx.Module):
    """Text and image (with the condition) each with their own weights, attending together."""

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs, dtype: Dtype):
        self.image = Stream(config, rngs=rngs, dtype=dtype)
        self.text = Stream(config, rngs=rngs, dtype=dtype)

    def modulation(self, vector: Float[Array, "b k d"], ctx: Context) -> DoubleModulation:
        """Depends only on the time, the guidance and the pooled text, not on any token."""
        return DoubleModulation(self.image.mod(vector, ctx.lora_vectors), self.text.mod(vector[:, :1], ctx.lora_text))

    def __call__(
        self, text: Float[Array, "b t d"], image: Float[Array, "b ic d"], modulation: DoubleModulation, ctx: Context
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b ic d"]]:
        """``image`` consists of image tokens, then condition tokens."""
        t, c = text.shape[1], ctx.n_condition
        text_rope, image_rope = (Rope(*(part[rows] for part in ctx.rope)) for rows in (slice(t), slice(t, None)))
        text_mod = per_token_chunks(modulation.text, 6, t, 0)
        image_mod = per_token_chunks(modulation.image, 6, image.shape[1], c)
        rows = ctx.lora_rows(image.shape[1])

        text_qkv = self.text.qkv(modulate(text, *text_mod[:2]), text_rope, ctx.lora_text)
        image_qkv = self.image.qkv(modulate(image, *image_mod[:2]), image_rope, rows)
        attended = ctx.attend(*map(_one_after_the_other, text_qkv, image_qkv))
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
        """shift, scale, gate; depends only on the time, the guidance and the pooled text."""
        return self.mod(vector, ctx.lora_vectors)

    def __call__(
        self, x: Float[Array, "b s d"], modulation: Float[Array, "b k o"], ctx: Context
    ) -> Float[Array, "b s d"]:
        """``x`` consists of text, image and condition tokens."""
        rows = ctx.lora_rows(x.shape[1])
        shift, scale, gate = per_token_chunks(modulation, 3, x.shape[1], ctx.n_condition)
        y = modulate(x, shift, scale)
        q, k, v, hidden = each_linear((self.qkv.q, self.qkv.k, self.qkv.v, self.mlp), y, rows)
        attended = _merge_heads(ctx.attend(*self.qkv.turned(q, k, v, ctx.rope, ctx.rope)))
        return x + gate * self.out.of_parts((attended, jax.nn.gelu(hidden, approximate=True)), rows)

    def image_alone(
        self, x: Float[Array, "b s d"], text: int, modulation: Float[Array, "b k o"], ctx: Context
    ) -> Float[Array, "b i d"]:
        """The image's rows of the result: all that is read of the last block. Other tokens are keys and values only.

        Args:
            text: number of text tokens.
        """
        image = slice(text, x.shape[1] - ctx.n_condition)
        shift, scale, _ = per_token_chunks(modulation, 3, x.shape[1], ctx.n_condition)
        k, v = each_linear((self.qkv.k, self.qkv.v), modulate(x, shift, scale), ctx.lora_rows(x.shape[1]))
        # Row 0 of the modulation is the image's. Made anew from x, since rows of the result above would be copied.
        shift, scale, gate = jnp.split(modulation[:, :1], 3, axis=-1)
        lora = ctx.lora_text
        x = x[:, image]
        q, hidden = each_linear((self.qkv.q, self.mlp), modulate(x, shift, scale), lora)
        turned = self.qkv.turned(q, k, v, Rope(*(part[image] for part in ctx.rope)), ctx.rope)
        attended = _merge_heads(ctx.attend(*turned))
        return x + gate * self.out.of_parts((attended, jax.nn.gelu(hidden, approximate=True)), lora)


def _one_after_the_other(text: Float[Array, "b t n h"], image: Float[Array, "b ic n h"]) -> Float[Array, "b _ n h"]:
    """Joins two streams; padded and added, which is fused into what made them, where a concatenation is a kernel."""
    t, ic = text.shape[1], image.shape[1]
    return jnp.pad(text, ((0, 0), (0, ic), (0, 0), (0, 0))) + jnp.pad(image, ((0, 0), (t, 0), (0, 0), (0, 0)))


def _whole_sequence(x: Float[Array, "b s n h"]) -> Float[Array, "b s n h"]:
    """Exchanges tokens cut over the mesh for heads before streams are joined, so that no join is across devices."""
    return constrain(x, BATCH, None, HEADS) if has_axis(SEQUENCE) else x


def _merge_heads(x: Float[Array, "b s n h"]) -> Float[Array, "b s d"]:
    """Joins the heads; on a mesh that cuts tokens, each device gets its own tokens again."""
    x = x.reshape(*x.shape[:2], -1)
    return constrain(x, BATCH, TOKENS, (TENSOR,)) if has_axis(SEQUENCE) else x
