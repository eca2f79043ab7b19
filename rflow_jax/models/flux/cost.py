"""What a pass through the transformer costs, by formula: compilers count loops once and kernels not at all."""

from __future__ import annotations

from rflow_jax.models.flux.config import FluxConfig


def forward_flops(config: FluxConfig, *, text: int, image: int, condition: int = 0) -> float:
    """Floating-point operations of one sample's forward pass, products and attention alone.

    Args:
        text, image, condition: numbers of tokens.
    """
    tokens = text + image + condition
    d, m = config.width, config.mlp_width
    # Both kinds of block hold 4 d^2 + 2 d m weights a token: q, k, v, out and the feed-forward part.
    weights = 4 * d * d + 2 * d * m
    blocks = config.num_layers + config.num_single_layers
    attention = 4 * tokens * tokens * d
    return float(blocks * (2 * tokens * weights + attention))
