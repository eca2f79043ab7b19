"""Qwen2.5-VL: pictures and text -> embeddings, hidden states, logits."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.attention import AttentionImpl
from rflow_jax.models.layers import LoraRows, abstract
from rflow_jax.models.qwen2.decoder import Qwen2
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import VisionLayout
from rflow_jax.models.qwen2_5_vl.vision import VisionTower
from rflow_jax.typing import Array, Float, Int

LANGUAGE_LINEARS = r"language\..*"  # most of the weights; quantizing the tower would save little


class Qwen25VL(nnx.Module):
    """The vision tower and the language model.

    Source: Bai et al., "Qwen2.5-VL Technical Report"; ``Qwen2_5_VLForConditionalGeneration`` of Transformers.

    Args:
        head: whether the language model has a head of its own (see :class:`rflow_jax.models.qwen2.decoder.Qwen2`).
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
            patches, layout: of all pictures of the batch; None: text alone.
            places: for every token the row of the pictures' tokens (all pictures one after another, each with its
                padding) that takes its place, or -1.
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
    """Puts the pictures' tokens where ``places`` names their row, and leaves the text where it is negative."""
    rows = seen.reshape(-1, seen.shape[-1])[jnp.maximum(places, 0)]
    return jnp.where(places[..., None] < 0, text, rows.astype(text.dtype))


def abstract_qwen2_5_vl(config: Qwen25VLConfig, dtype: Dtype = jnp.float32, *, head: bool = True) -> Qwen25VL:
    """The network without numbers, to be filled by a loader or counted."""
    return abstract(lambda rngs: Qwen25VL(config, head=head, rngs=rngs, dtype=dtype))
