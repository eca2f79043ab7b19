"""The loss of the corrector: the velocity of the straight path between an image and noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax.typing import Dtype

from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.flux.layers import Rope
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.typing import Array, Float

TRAINING_GUIDANCE = 1.0  # the network's guidance input while it is trained


class Examples(NamedTuple):
    """A batch of encoded examples.

    Attributes:
        x_0: packed latents of the good images.
        condition: packed latents of the bad ones; None trains without a condition.
        text, pooled: the prompts' embeddings by T5 and CLIP.
    """

    x_0: Float[Array, "b i f"]
    condition: Float[Array, "b c f"] | None
    text: Float[Array, "b t e"]
    pooled: Float[Array, "b p"]


def noisy(x_0: Float[Array, "b i f"], x_1: Float[Array, "b i f"], t: Float[Array, " b"]) -> Float[Array, "b i f"]:
    """x_t = (1 - t) x_0 + t x_1, with x_1 the noise."""
    t = t[:, None, None]
    return (1 - t) * x_0 + t * x_1


def predict(
    network: FluxTransformer,
    examples: Examples,
    x_t: Float[Array, "b i f"],
    t: Float[Array, " b"],
    rope: Rope,
    *,
    dtype: Dtype = jnp.float32,
    flags: ConditionFlags = ConditionFlags(),
    attention: AttentionImpl = "auto",
    remat: Remat = "none",
) -> Float[Array, "b i f"]:
    """The network's velocity at x_t, with the guidance of training, as float32.

    Args:
        dtype: what the network computes in.
        flags, attention, remat: as in the network's call.
    """
    guidance = jnp.full_like(t, TRAINING_GUIDANCE) if network.config.guidance_embeds else None
    velocity = network(
        x_t.astype(dtype),
        examples.text,
        examples.pooled,
        t,
        rope=rope,
        guidance=guidance,
        condition=examples.condition,
        flags=flags,
        attention=attention,
        remat=remat,
    )
    return velocity.astype(jnp.float32)


def flow_matching_losses(
    network: FluxTransformer,
    examples: Examples,
    t: Float[Array, " b"],
    x_1: Float[Array, "b i f"],
    rope: Rope,
    **options: Any,
) -> Float[Array, " b"]:
    """Mean squared error of the velocity to x_1 - x_0, of each sample.

    Args:
        t: times in [0, 1], 1 is noise; the corrector is trained with the sigmoid of a standard normal.
        x_1: packed noise.
        options: as in :func:`predict`.
    """
    velocity = predict(network, examples, noisy(examples.x_0, x_1, t), t, rope, **options)
    return jnp.mean(jnp.square(velocity - (x_1 - examples.x_0)), axis=(1, 2))


def flow_matching_loss(*args: Any, **options: Any) -> Float[Array, ""]:
    """The mean of :func:`flow_matching_losses` over the batch."""
    return jnp.mean(flow_matching_losses(*args, **options))
