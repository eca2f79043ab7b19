"""Qwen2.5-VL: the vision tower, the whole network, and the reward model on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.attention import attend
from rflow_jax.models.layers import Linear, LoraRows, RMSNorm, abstract, init_kernel, matmul
from rflow_jax.models.options import AttentionImpl
from rflow_jax.models.qwen2.model import GatedFeedForward, Qwen2, Rope, apply_rope, as_samples
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig, RewardToken, VisionConfig
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
        """Tokens in the order of the units; those of padding are meaningless.

        Args:
            patches: normalised pixels, in the processor's order.
            layout: of these pictures.
            lora: the patches that adapters act on; None: none.
        """
        x = as_samples(self.patch_in(patches))
        positions, lengths, windows, window_lengths, slots = (jnp.asarray(x) for x in layout)
        angle = rope_angles(positions, self.config)
        rope = Rope(jnp.cos(angle), jnp.sin(angle))
        in_windows = Rope(*(_fetch(table, windows) for table in rope))
        whole, windowed = Scope(rope, lengths), Scope(in_windows, window_lengths.reshape(-1), windows, slots)
        for number, block in enumerate(self.blocks):
            scope = whole if number in self.config.fullatt_block_indexes else windowed
            x = block(x, scope, lora, attention)
        return self.merger(x, lora)


class Scope(NamedTuple):
    """The patches that attend to each other: those of a picture, or of a window if there are windows."""

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
        else:  # each window is a row of the batch
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


LANGUAGE_LINEARS = r"language\..*"  # most of the weights; quantizing the tower would save little


class Qwen25VL(nnx.Module):
    """The vision tower and the language model.

    Source: Bai et al., "Qwen2.5-VL Technical Report"; ``Qwen2_5_VLForConditionalGeneration`` of Transformers.

    Args:
        head: whether the language model has a head of its own (see :class:`rflow_jax.models.qwen2.model.Qwen2`).
    """

    def __init__(self, config: Qwen25VLConfig, *, head: bool = True, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config = config
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=dtype)
        self.language = Qwen2(config.language, head=head, rngs=rngs, dtype=dtype)

    def embed(
        self,
        ids: Int[Array, "b t"],
        patches: Float[Array, "i p f"] | None = None,
        layout: VisionLayout | None = None,
        places: Int[Array, "b t"] | None = None,
        *,
        lora: LoraRows = None,
        attention: AttentionImpl = "auto",
    ) -> Float[Array, "b t d"]:
        """Embeddings of the tokens, pictures in their places.

        Args:
            patches, layout: of all pictures of the batch; None: text only.
            places: for every token the row of the pictures' tokens (all pictures one after another, each with its
                padding) that replaces it, or -1.
            lora: the patches that the tower's adapters act on; None: none.
        """
        text = self.language.embed(ids)
        if patches is None or layout is None or places is None:
            return text
        seen = self.vision(patches.astype(text.dtype), layout, lora=lora, attention=attention)
        return place_pictures(text, seen, places)


def place_pictures(
    text: Float[Array, "b t d"], seen: Float[Array, "i u d"], places: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    """Puts the pictures' tokens at the positions whose ``places`` name their row, and keeps the text elsewhere."""
    rows = seen.reshape(-1, seen.shape[-1])[jnp.maximum(places, 0)]
    return jnp.where(places[..., None] < 0, text, rows.astype(text.dtype))


def abstract_qwen2_5_vl(config: Qwen25VLConfig, dtype: Dtype = jnp.float32, *, head: bool = True) -> Qwen25VL:
    """The network as shapes, to be filled by a loader or counted."""
    return abstract(lambda rngs: Qwen25VL(config, head=head, rngs=rngs, dtype=dtype))


class RewardModel(Qwen25VL):
    """The network without a language head, and a linear on its hidden states.

    Source: ``Qwen2VLRewardModelBT`` of ReflectionFlow's ``reward_modeling``.

    Args:
        outputs: number of rewards of a picture.
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
            special: the special token; each sample has it once.
        """
        if token == "mean":
            counted = jnp.arange(ids.shape[1]) < jnp.maximum(lengths - 1, 1)[:, None]
            scores = self._score(hidden)
            return jnp.sum(jnp.where(counted[..., None], scores, 0), axis=1) / jnp.sum(counted, axis=1, keepdims=True)
        index = lengths - 1 if token == "last" else jnp.argmax(ids == special, axis=1)
        return self._score(jnp.take_along_axis(hidden, index[:, None, None], axis=1))[:, 0]

    def _score(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t k"]:
        return matmul(hidden, self.reward.kernel.get_value(), dtype=jnp.float32)


class SpecialTokenEmbedding(nnx.Module):
    """A table of vectors, and a separate vector of one token, which can be trained while the table is frozen.

    Args:
        embedding: the table.
        token: the token, which may also have a row in the table.
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
    """A reward model that takes over the parameters of a language model without its head.

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
    """The network as shapes, to be filled by a loader or counted."""
    return abstract(lambda rngs: RewardModel(config, outputs, rngs=rngs, dtype=dtype))
