"""CLIP: images and texts in one space; the text model is that of FLUX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.convolution import PatchEmbedding
from rflow_jax.models.layers import Embedding, LayerNorm, Linear
from rflow_jax.models.options import require_kind
from rflow_jax.models.text_encoders import ClipBlock, ClipLayersConfig, ClipTextConfig, ClipTextEncoder
from rflow_jax.typing import Array, Float, Int

# The defaults of Transformers for values missing in config.json; not CLIP-L's values.
_PROJECTION_DIM = 512


@dataclass(frozen=True)
class ClipVisionConfig(ClipLayersConfig):
    """Sizes, in the names of Transformers' ``config.json`` and with its defaults, those of ViT-B/32."""

    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32

    def __post_init__(self) -> None:
        self.require_usable("vision_config")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ClipVisionConfig:
        """From the ``vision_config`` in CLIP's ``config.json``; raises InputError for another network."""
        require_kind(config, "model_type", "clip_vision_model", "vision_config")
        return cls(**{key: config[key] for key in cls.__dataclass_fields__ if key in config})


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
