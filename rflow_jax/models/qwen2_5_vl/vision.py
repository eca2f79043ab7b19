"""The vision tower: patches of pictures -> tokens of the language model."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.attention import AttentionImpl, attend
from rflow_jax.models.layers import Linear, LoraRows, RMSNorm, init_kernel
from rflow_jax.models.qwen2.layers import GatedFeedForward, as_samples
from rflow_jax.models.qwen2.rope import Rope, apply_rope
from rflow_jax.models.qwen2_5_vl.config import VisionConfig
from rflow_jax.models.qwen2_5_vl.layout import VisionLayout
from rflow_jax.typing import Array, Float, Int

EPS = 1e-6
THETA = 10_000.0


class VisionTower(nnx.Module):
    """Patches of a batch of pictures, each padded to the same number -> one token for each unit of patches.

    Source: ``Qwen2_5_VisionTransformerPretrainedModel`` of Transformers. It computes in the dtype of the patches;
    norms, rotary angles and softmax in float32.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config = config
        self.patch_in = PatchEmbedding(config, rngs=rngs, dtype=dtype)
        self.blocks = nnx.List(VisionBlock(config, rngs=rngs, dtype=dtype) for _ in range(config.depth))
        self.merger = PatchMerger(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        patches: Float[Array, "b p f"],
        layout: VisionLayout,
        *,
        lora: LoraRows = None,
        attention: AttentionImpl = "auto",
    ) -> Float[Array, "b u o"]:
        """Tokens in the order of the units; those of padding mean nothing.

        Args:
            patches: normalised pixels, in the processor's order.
            layout: places of these pictures.
            lora: the patches that adapters act on; None: none.
        """
        x = as_samples(self.patch_in(patches))
        whole, windowed = self._scopes(layout)
        for number, block in enumerate(self.blocks):
            scope = whole if number in self.config.fullatt_block_indexes else windowed
            x = block(x, scope, lora, attention)
        return self.merger(x, lora)

    def _scopes(self, layout: VisionLayout) -> tuple[Scope, Scope]:
        """The whole pictures, and the windows."""
        positions, lengths, windows, window_lengths, slots = (jnp.asarray(x) for x in layout)
        angle = rope_angles(positions, self.config)
        rope = Rope(jnp.cos(angle), jnp.sin(angle))
        in_windows = Rope(*(_fetch(table, windows) for table in rope))
        return Scope(rope, lengths), Scope(in_windows, window_lengths.reshape(-1), windows, slots)


class Scope(NamedTuple):
    """Over which patches an attention goes: those of a picture, or of a window where there are any."""

    rope: Rope
    lengths: Int[Array, " bw"]
    windows: Int[Array, "b w s"] | None = None
    slots: Int[Array, "b p"] | None = None


class PatchEmbedding(nnx.Module):
    """A convolution whose strides are its sizes: a product of each patch with one matrix."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        side = config.patch_size
        shape = (config.in_channels, config.temporal_patch_size, side, side, config.hidden_size)
        flat = init_kernel(rngs.params(), (config.patch_values, config.hidden_size), dtype)
        self.kernel = nnx.Param(flat.reshape(shape))

    def __call__(self, patches: Float[Array, "b p f"]) -> Float[Array, "b p d"]:
        kernel = self.kernel[...]
        return jnp.dot(patches, kernel.reshape(-1, kernel.shape[-1]).astype(patches.dtype))


class VisionBlock(nnx.Module):
    """Attention, then a gated feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d = config.hidden_size
        self.attn_norm = RMSNorm(d, eps=EPS, dtype=dtype)
        self.attn = VisionAttention(config, rngs=rngs, dtype=dtype)
        self.ff_norm = RMSNorm(d, eps=EPS, dtype=dtype)
        self.ff = GatedFeedForward(d, config.intermediate_size, use_bias=True, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b p d"], scope: Scope, lora: LoraRows, attention: AttentionImpl
    ) -> Float[Array, "b p d"]:
        y = self.attn_norm(x)
        if scope.windows is None or scope.slots is None:
            y = self.attn(y, scope.rope, scope.lengths, lora, attention)
        else:  # each window is a row of the batch of its own
            rows = as_samples(_fetch(y, scope.windows))
            windows = as_samples(self.attn(rows, scope.rope, scope.lengths, lora, attention))
            y = _take(windows.reshape(x.shape[0], -1, x.shape[-1]), scope.slots)
        x = as_samples(x + y)
        return as_samples(x + self.ff(self.ff_norm(x), lora))


class VisionAttention(nnx.Module):
    """Self-attention over sequences of patches, each of its own length."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d = config.hidden_size
        self.heads = config.num_heads
        self.q = Linear(d, d, rngs=rngs, dtype=dtype)
        self.k = Linear(d, d, rngs=rngs, dtype=dtype)
        self.v = Linear(d, d, rngs=rngs, dtype=dtype)
        self.out = Linear(d, d, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b s d"], rope: Rope, lengths: Int[Array, " b"], lora: LoraRows, attention: AttentionImpl
    ) -> Float[Array, "b s d"]:
        q, k, v = (layer(x, lora).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q, self.k, self.v))
        attended = attend(apply_rope(q, rope), apply_rope(k, rope), v, lengths=lengths, impl=attention)
        return self.out(attended.reshape(x.shape), lora)


class PatchMerger(nnx.Module):
    """The patches of a unit side by side -> one token."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        wide = config.hidden_size * config.unit
        self.norm = RMSNorm(config.hidden_size, eps=EPS, dtype=dtype)
        self.up = Linear(wide, wide, rngs=rngs, dtype=dtype)
        self.down = Linear(wide, config.out_hidden_size, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b p d"], lora: LoraRows) -> Float[Array, "b u o"]:
        units = self.norm(x).reshape(x.shape[0], -1, self.up.kernel.shape[0])
        return self.down(jax.nn.gelu(self.up(units, lora), approximate=False), lora)


def rope_angles(positions: Int[Array, "b p 2"], config: VisionConfig) -> Float[Array, "b p h2"]:
    """Angles of the rows, then those of the columns."""
    half = config.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (np.float32(1) / np.power(np.float32(THETA), exponents)).astype(np.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return angles.reshape(*positions.shape[:2], half)


def _fetch(x: Float[Array, "b p c"], windows: Int[Array, "b w s"]) -> Float[Array, "bw s c"]:
    """The rows in every slot; windows become rows of the batch."""
    b, w, s = windows.shape
    return _take(x, windows.reshape(b, w * s)).reshape(b * w, s, x.shape[-1])


def _take(x: Float[Array, "b p c"], index: Int[Array, "b k"]) -> Float[Array, "b k c"]:
    return jnp.take_along_axis(x, index[..., None], axis=1)
