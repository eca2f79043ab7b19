"""Sizes of a FLUX transformer, its operations, and the flags of its condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.models.options import Remat


@dataclass(frozen=True)
class FluxConfig:
    """Sizes, in the names of diffusers' ``transformer/config.json``; the defaults are FLUX.1-dev's."""

    in_channels: int = 64
    num_layers: int = 19  # double-stream blocks
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096  # T5
    pooled_projection_dim: int = 768  # CLIP
    guidance_embeds: bool = True  # False: FLUX.1-schnell
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    mlp_ratio: float = 4.0
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise InputError(
                f"transformer config: axes_dims_rope {list(self.axes_dims_rope)} must add up to "
                f"attention_head_dim {self.attention_head_dim}"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> FluxConfig:
        """From the content of a diffusers ``transformer/config.json``; raises InputError for another network."""
        if (name := config.get("_class_name", "FluxTransformer2DModel")) != "FluxTransformer2DModel":
            raise InputError(f"transformer config: a {name}; this is not a FLUX transformer")
        out_channels = config.get("out_channels")
        if config.get("patch_size", 1) != 1 or out_channels not in (None, config.get("in_channels")):
            raise InputError("transformer config: only patch_size 1 and out_channels equal to in_channels are FLUX")
        known = {key: config[key] for key in cls.__dataclass_fields__ if key in config}
        if "axes_dims_rope" in known:
            known["axes_dims_rope"] = tuple(known["axes_dims_rope"])
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class ConditionFlags:
    """Flags of the condition branch; the names and defaults of the original's ``model`` config.

    Configurations that offer them inherit them.

    Attributes:
        union_cond_attn: whether the condition and the rest attend to each other.
        add_cond_attn: add the condition's attention output to the image's (needs equal token counts).
        latent_lora: let the LoRA act on image and text tokens too, not only on the condition's.
    """

    union_cond_attn: bool = True
    add_cond_attn: bool = False
    latent_lora: bool = False

    @property
    def flags(self) -> ConditionFlags:
        """These flags alone."""
        return ConditionFlags(
            union_cond_attn=self.union_cond_attn, add_cond_attn=self.add_cond_attn, latent_lora=self.latent_lora
        )

    def require_scalable(self) -> None:
        """Raises InputError unless a ``condition_scale`` other than 1 fits these flags."""
        if not self.union_cond_attn:
            raise InputError(
                "condition_scale replaces the mask of union_cond_attn: false; set one of the two, not both"
            )


def block_weights(config: FluxConfig) -> int:
    """Weights of all blocks without the modulations: those that tokens are multiplied with."""
    streams = 2 * config.num_layers + config.num_single_layers
    return streams * _weights_a_token(config)


def forward_parts(config: FluxConfig, *, text: int, image: int, condition: int = 0) -> tuple[int, int]:
    """Operations of one sample's forward pass: those of products with weights, and those of attention.

    Of the last block only the image is read: other tokens need keys and values there. (Stacked blocks compute the rest
    too, which is not counted.)
    """
    tokens = text + image + condition
    blocks = config.num_layers + config.num_single_layers
    idle = tokens - image if config.num_single_layers else 0
    weights = blocks * tokens * _weights_a_token(config) - idle * (_weights_a_token(config) - 2 * config.width**2)
    return 2 * weights, 4 * (blocks * tokens - idle) * tokens * config.width


def forward_flops(config: FluxConfig, *, text: int, image: int, condition: int = 0) -> float:
    """Floating-point operations of one sample's forward pass, products and attention only.

    Args:
        text, image, condition: numbers of tokens.
    """
    return float(sum(forward_parts(config, text=text, image=image, condition=condition)))


def training_flops(
    config: FluxConfig, *, text: int, image: int, condition: int = 0, lora: bool = True, remat: Remat = "full"
) -> float:
    """Operations of one sample's training step on the device, recomputation included.

    A product with a weight has one product for its input's gradient, and one for the weight's if that is trained;
    attention's two products have four. ``remat`` "full" repeats the whole forward pass of the blocks, "dots" only
    attention, whose products it does not keep ("dots_and_attention" keeps those of a kernel). Left out as in
    :func:`forward_flops`: adapters, modulations, both ends of the network, and the scores that a flash kernel computes
    once more in its backward pass.

    ``Corrector.flops`` (training) is another figure: the model's, for a utilisation, without recomputation and with
    attention's gradient as one forward pass.
    """
    weights, attention = forward_parts(config, text=text, image=image, condition=condition)
    again = {"none": 0, "dots_and_attention": 0, "dots": attention, "full": weights + attention}[remat]
    gradients = weights * (1 if lora else 2) + 2 * attention
    return float(weights + attention + gradients + again)


def _weights_a_token(config: FluxConfig) -> int:
    """Both kinds of block have 4 d^2 + 2 d m weights a token: q, k, v, out and the feed-forward part."""
    return 4 * config.width * config.width + 2 * config.width * config.mlp_width
