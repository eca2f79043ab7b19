"""Samplers: plain functions from a velocity field, noise and times to a sample.

The convention everywhere: x_t = (1 - t) x_0 + t x_1 with x_1 the noise, so dx/dt = x_1 - x_0 is what the network
predicts, and sampling integrates from t = 1 down to t = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rflow_jax.typing import Array, Float

# (x [b, i, f] float32, t scalar, step) -> velocity of the same shape
Velocity = Callable[[Array, Array, Array], Array]


def euler(
    velocity: Velocity, x: Float[Array, "b i f"], sigmas: Float[Array, " n"]
) -> tuple[Float[Array, "b i f"], Float[Array, "k b i f"]]:
    """Explicit Euler steps from ``sigmas[0]`` to ``sigmas[-1]``; x stays float32 between steps.

    Returns:
        The sample, and x after every step (dropped by the compiler where nobody reads it).
    """

    def step(x: Array, k: Array) -> tuple[Array, Array]:
        t, t_next = sigmas[k], sigmas[k + 1]
        x = x + (t_next - t) * velocity(x, t, k).astype(jnp.float32)
        return x, x

    return jax.lax.scan(step, x.astype(jnp.float32), jnp.arange(sigmas.shape[0] - 1))


def guided(with_condition: Array, with_black: Array, scale: Array | float) -> Array:
    """Image guidance: away from what a black condition gives, ``u + s (c - u)``."""
    return with_black + scale * (with_condition - with_black)
