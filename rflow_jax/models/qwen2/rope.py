"""Rotary positions of one axis, or of three (time, row, column)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rflow_jax.typing import Array, Float, Int


class Rope(NamedTuple):
    """Cosines and sines of every token's rotary angles, float32; an angle turns channels i and i + h/2 of a head."""

    cos: Float[Array, "b s h2"]
    sin: Float[Array, "b s h2"]


def rope_of(
    positions: Int[Array, "b s"] | Int[Array, "3 b s"], head_dim: int, theta: float, sections: tuple[int, ...] = ()
) -> Rope:
    """Rotary angles of tokens.

    Args:
        positions: [b, s]; or [3, b, s], time, row and column of each token.
        head_dim: channels of a head.
        theta: base of the frequencies.
        sections: how many of the frequencies, from the highest, each of the three axes turns.
    """
    # Rounded as PyTorch rounds them: the power in float32, then its inverse.
    powers = np.power(np.float32(theta), np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    frequencies = (np.float32(1) / powers).astype(np.float32)
    where = positions.astype(jnp.float32)
    if positions.ndim == 2:
        angle = where[..., None] * frequencies
    else:
        axis = np.repeat(np.arange(len(sections)), sections)
        angle = jnp.moveaxis(where[axis], 0, -1) * frequencies
    return Rope(jnp.cos(angle), jnp.sin(angle))


def apply_rope(x: Float[Array, "b s n h"], rope: Rope) -> Float[Array, "b s n h"]:
    """Turns the channel pairs (i, i + h/2) of every head, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
