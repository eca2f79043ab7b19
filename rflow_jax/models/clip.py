"""CLIP: the text model, which encodes FLUX's prompt into one vector, and the vision model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.convolution import PatchEmbedding
from rflow_jax.models.layers import Embedding, LayerNorm, Linear, SelfAttention
from rflow_jax.models.options import require_heads, require_kind
from rflow_jax.models.partitioning import BATCH, constrain
from rflow_jax.typing import Array, Float, Int

# Old configurations have 2 instead of the right id; the end token is then a prompt's highest id.
LEGACY_EOS_TOKEN_ID = 2

# The defaults of Transformers for values missing in config.json; not CLIP-L's values.
_PROJECTION_DIM = 512
_TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "eos_token_id": 49_407,
}


@dataclass(frozen=True)
class ClipTextConfig:
    """Sizes, in the names of Transformers' ``config.json``; the defaults are those of FLUX.1's CLIP-L."""

    vocab_size: int = 49_408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = LEGACY_EOS_TOKEN_ID

    def __post_init__(self) -> None:
        check_layers(self, "text_encoder config")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ClipTextConfig:
        """From the content of ``text_encoder/config.json``; raises InputError for another network."""
        require_kind(config, "model_type", "clip_text_model", "text_encoder config")
        return cls(**_TEXT_DEFAULTS | {key: config[key] for key in cls.__dataclass_fields__ if key in config})


@dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes, in the names of Transformers' ``config.json`` and with its defaults, those of ViT-B/32."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_layers(self, "vision_config")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ClipVisionConfig:
        """From the ``vision_config`` in CLIP's ``config.json``; raises InputError for another network."""
        require_kind(config, "model_type", "clip_vision_model", "vision_config")
        return cls(**{key: config[key] for key in cls.__dataclass_fields__ if key in config})


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


def check_layers(config: ClipTextConfig | ClipVisionConfig, source: str) -> None:
    """Raises InputError, which begins with ``source``, for sizes that no layer can have."""
    require_heads(config.hidden_size, config.num_attention_heads, source)
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"{source}: hidden_act {config.hidden_act!r} is not supported, only {', '.join(ACTIVATIONS)}")


class ClipBlock(nnx.Module):
    """Attention, then a feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: ClipTextConfig | ClipVisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
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


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the whole.

    Attributes:
        projection_dim: width of the space in which images and texts are compared.
    """

    text: ClipTextConfig
    vision: ClipVisionConfig
    projection_dim: int = _PROJECTION_DIM

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ClipConfig:
        """From the content of CLIP's ``config.json``; raises InputError for another network."""
        if (kind := config.get("model_type")) != "clip":
            raise InputError(f"config: model_type {kind!r} is not supported, only 'clip'")
        return cls(
            ClipTextConfig.from_json(part_of(config, "text")),
            ClipVisionConfig.from_json(part_of(config, "vision")),
            config.get("projection_dim", _PROJECTION_DIM),
        )


def part_of(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The sizes of one part; early files have them twice, and the second time is what counts.

    Raises:
        InputError: they are not an object.
    """
    whole: dict[str, Any] = {}
    for name in (f"{part}_config", f"{part}_config_dict"):
        own = config.get(name) or {}
        if not isinstance(own, Mapping):
            raise InputError(f"config: {name} is {own!r}; expected an object with keys")
        whole |= own
    return whole


class ClipVisionEncoder(nnx.Module):
    """Images -> one vector each, that of the class token after the last norm."""

    def __init__(self, config: ClipVisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.class_embedding = nnx.Param(jnp.zeros((d,), dtype))
        self.patches = PatchEmbedding(config.num_channels, d, config.patch_size, use_bias=False, rngs=rngs, dtype=dtype)
        self.positions = Embedding(1 + (config.image_size // config.patch_size) ** 2, d, rngs=rngs, dtype=dtype)
        self.first_norm = LayerNorm(d, eps=eps, dtype=dtype)
        self.blocks = nnx.List(ClipBlock(config, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers))
        self.final_norm = LayerNorm(d, eps=eps, dtype=dtype)

    def __call__(self, pixels: Float[Array, "b y x c"]) -> Float[Array, "b d"]:
        patches = self.patches(pixels.astype(self.class_embedding[...].dtype))
        first = jnp.broadcast_to(self.class_embedding[...], (len(patches), 1, patches.shape[-1]))
        x = jnp.concatenate([first, patches], axis=1) + self.positions.embedding[...]
        x = self.first_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x[:, 0])


class LogitScale(nnx.Variable):
    """The logarithm of the factor of cosines: float32 whatever the parameters are."""


class Clip(nnx.Module):
    """Images and texts in one space. It computes in the dtype of its parameters, the comparison in float32.

    Source: Radford et al., "Learning Transferable Visual Models"; ``CLIPModel`` of Transformers.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config = config
        self.text = ClipTextEncoder(config.text, rngs=rngs, dtype=dtype)
        self.vision = ClipVisionEncoder(config.vision, rngs=rngs, dtype=dtype)
        size = config.projection_dim
        self.text_out = Linear(config.text.hidden_size, size, use_bias=False, rngs=rngs, dtype=dtype)
        self.vision_out = Linear(config.vision.hidden_size, size, use_bias=False, rngs=rngs, dtype=dtype)
        self.logit_scale = LogitScale(jnp.zeros(()))

    def __call__(self, pixels: Float[Array, "b y x c"], ids: Int[Array, "b t"]) -> Float[Array, " b"]:
        """The score of each image with its own text: the cosine of their vectors, times the model's scale (100)."""
        image = unit(self.vision_out(self.vision(pixels)))
        text = unit(self.text_out(self.text(ids)[1]))
        return jnp.sum(image * text, axis=-1) * jnp.exp(self.logit_scale[...])


def unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
