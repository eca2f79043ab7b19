"""NVILA: it looks at the pictures of an image, reads what is asked, and says which word comes next."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.layers import abstract
from rflow_jax.models.nvila.config import NvilaConfig
from rflow_jax.models.nvila.projector import Projector
from rflow_jax.models.qwen2.decoder import Qwen2
from rflow_jax.models.siglip import SiglipVisionTower
from rflow_jax.typing import Array, Float, Int, UInt8


class Nvila(nnx.Module):
    """The three networks. They compute in the dtype of their parameters.

    Source: Liu et al., "NVILA: Efficient Frontier Visual Language Models".
    """

    def __init__(self, config: NvilaConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d = config.language.hidden_size
        self.config = config
        self.tower = SiglipVisionTower(config.vision, rngs=rngs, dtype=dtype)
        self.projector = Projector(config.vision.hidden_size, d, rngs=rngs, dtype=dtype)
        self.language = Qwen2(config.language, rngs=rngs, dtype=dtype)

    def look(self, pictures: UInt8[Array, "p y x c"], levels: Float[Array, "256 c"]) -> Float[Array, "p i d"]:
        """The image tokens of each picture.

        Args:
            levels: what the tower sees of each level of each channel.
        """
        pixels = levels[pictures, jnp.arange(levels.shape[1])]
        return self.projector(self.tower.features(pixels, self.config.mm_vision_select_layer))

    def embed(
        self, ids: Int[Array, "b t"], feature: Int[Array, "b t"], tokens: Float[Array, "i d"]
    ) -> Float[Array, "b t d"]:
        """The language model's input.

        Args:
            ids: tokens of the text.
            feature: index of the image token that stands there instead; -1 in the text.
            tokens: image tokens of all pictures of all samples.
        """
        pictured = tokens[jnp.maximum(feature, 0)]
        return jnp.where((feature >= 0)[..., None], pictured, self.language.embed(ids).astype(tokens.dtype))

    def last_state(self, x: Float[Array, "b t d"], lengths: Int[Array, " b"]) -> Float[Array, "b d"]:
        """The hidden state of each sample's last position, after the last norm; ``x`` is padded on the right."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        hidden = self.language(x, positions)
        return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def abstract_nvila(config: NvilaConfig, dtype: Dtype = jnp.float32) -> Nvila:
    """The network without numbers, to be filled by a loader or counted."""
    return abstract(lambda rngs: Nvila(config, rngs=rngs, dtype=dtype))
