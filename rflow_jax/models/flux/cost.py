"""What a pass through the transformer costs, by formula: compilers count loops once and kernels not at all."""

from __future__ import annotations

from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.remat import Remat


def block_weights(config: FluxConfig) -> int:
    """Weights of all blocks that tokens are multiplied with; modulations are not among them."""
    streams = 2 * config.num_layers + config.num_single_layers
    return streams * _weights_a_token(config)


def forward_parts(config: FluxConfig, *, text: int, image: int, condition: int = 0) -> tuple[int, int]:
    """Operations of one sample's forward pass: those of products with weights, and those of attention."""
    tokens = text + image + condition
    blocks = config.num_layers + config.num_single_layers
    return blocks * 2 * tokens * _weights_a_token(config), blocks * 4 * tokens * tokens * config.width


def forward_flops(config: FluxConfig, *, text: int, image: int, condition: int = 0) -> float:
    """Floating-point operations of one sample's forward pass, products and attention alone.

    Args:
        text, image, condition: numbers of tokens.
    """
    return float(sum(forward_parts(config, text=text, image=image, condition=condition)))


def training_flops(
    config: FluxConfig, *, text: int, image: int, condition: int = 0, lora: bool = True, remat: Remat = "full"
) -> float:
    """Operations of one sample's training step as the device does them, what is computed again included.

    A product with a weight has one product for its input's gradient, and one for the weight's if that is trained;
    attention's two products have four. ``remat`` "full" does the whole forward pass of the blocks again, "dots" only
    attention, whose products it does not keep. Left out as in :func:`forward_flops`: adapters, modulations, what is at
    the ends of the network, and the scores that a flash kernel makes once more in its backward pass.

    :attr:`rflow_jax.training.corrector.Corrector.flops` is another figure: the model's, for a utilisation, without what
    is computed again and with attention's gradient as one forward pass.
    """
    weights, attention = forward_parts(config, text=text, image=image, condition=condition)
    again = {"none": 0, "dots": attention, "full": weights + attention}[remat]
    gradients = weights * (1 if lora else 2) + 2 * attention
    return float(weights + attention + gradients + again)


def _weights_a_token(config: FluxConfig) -> int:
    """Both kinds of block hold 4 d^2 + 2 d m weights a token: q, k, v, out and the feed-forward part."""
    return 4 * config.width * config.width + 2 * config.width * config.mlp_width
