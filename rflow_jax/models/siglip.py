"""SigLIP's vision tower, which NVILA uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.attention import attend
from rflow_jax.models.convolution import PatchEmbedding
from rflow_jax.models.layers import Embedding, LayerNorm, Linear
from rflow_jax.models.options import require_heads, require_kind
from rflow_jax.models.partitioning import BATCH, constrain
from rflow_jax.typing import Array, Float

# The defaults of Transformers for values missing in config.json; not so400m's values.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
KIND, ACTIVATION = "siglip_vision_model", "gelu_pytorch_tanh"


@dataclass(frozen=True)
class SiglipVisionConfig:
    """Sizes, in the names of Transformers' ``config.json``; the defaults are so400m's at 448 pixels."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 448
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_heads(self.hidden_size, self.num_attention_heads, "vision_tower config")
        if self.patch_size > self.image_size:
            raise InputError(f"vision_tower config: patch_size {self.patch_size} is above image_size {self.image_size}")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> SiglipVisionConfig:
        """From the content of ``vision_tower/config.json``; raises InputError for another network."""
        require_kind(config, "model_type", KIND, "vision_tower config")
        require_kind(config, "hidden_act", ACTIVATION, "vision_tower config")
        return cls(**_DEFAULTS | {key: config[key] for key in cls.__dataclass_fields__ if key in config})

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


class SiglipVisionTower(nnx.Module):
    """Pictures -> a vector for each patch. It computes in the dtype of its parameters, norms in float32.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training"; ``SiglipVisionModel`` of Transformers
    without its pooling head, which nothing here uses.
    """

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d = config.hidden_size
        self.config = config
        self.patches = PatchEmbedding(config.num_channels, d, config.patch_size, rngs=rngs, dtype=dtype)
        self.positions = Embedding(config.grid**2, d, rngs=rngs, dtype=dtype)
        self.blocks = nnx.List(SiglipBlock(config, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers))
        self.final_norm = LayerNorm(d, eps=config.layer_norm_eps, dtype=dtype)

    def __call__(self, pixels: Float[Array, "b y x c"]) -> Float[Array, "b s d"]:
        """The hidden states after the last norm. Patches are in row-major order."""
        return self.final_norm(self.states(pixels)[-1])

    def features(self, pixels: Float[Array, "b y x c"], layer: int) -> Float[Array, "b s d"]:
        """The hidden states after ``layer`` blocks; negative counts from the end, -1 being the last block's.

        Raises:
            InputError: there is no such layer.
        """
        depth = len(self.blocks)
        if not -depth - 1 <= layer <= depth:
            raise InputError(f"the vision tower has {depth} layers; it has no hidden states {layer}")
        return self.states(pixels, layer % (depth + 1))[-1]

    def states(self, pixels: Float[Array, "b y x c"], depth: int | None = None) -> list[Float[Array, "b s d"]]:
        """The hidden states before the first block and after each of the first ``depth`` (None: all)."""
        x = self.patches(pixels.astype(self.positions.embedding[...].dtype)) + self.positions.embedding[...]
        states = [constrain(x, BATCH)]
        for block in self.blocks[:depth]:
            states.append(block(states[-1]))
        return states


class SiglipBlock(nnx.Module):
    """Attention, then a feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d, m, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attn_norm = LayerNorm(d, eps=eps, dtype=dtype)
        self.attn = SiglipAttention(d, config.num_attention_heads, rngs=rngs, dtype=dtype)
        self.ff_norm = LayerNorm(d, eps=eps, dtype=dtype)
        self.up = Linear(d, m, rngs=rngs, dtype=dtype)
        self.down = Linear(m, d, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        # Channels are whole between products, or a compiler may gather them instead.
        x = constrain(x + self.attn(self.attn_norm(x)), BATCH)
        return constrain(x + self.down(jax.nn.gelu(self.up(self.ff_norm(x)), approximate=True)), BATCH)


class SiglipAttention(nnx.Module):
    """Full attention over about a thousand patches, by the fastest kernel available."""

    def __init__(self, d: int, heads: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.heads = heads
        self.q, self.k, self.v, self.out = (Linear(d, d, rngs=rngs, dtype=dtype) for _ in range(4))

    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        q, k, v = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.q, self.k, self.v))
        return self.out(attend(q, k, v).reshape(x.shape))
