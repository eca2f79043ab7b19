"""Positions and times: rotary tables, sinusoidal time features and the small networks behind them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.layers import Linear, LoraRows
from rflow_jax.typing import Array, Float

TIME_FEATURES = 256
TIME_SCALE = 1000.0  # the network was trained on times and guidances multiplied by this
MAX_PERIOD = 10_000.0


class Rope(NamedTuple):
    """Cosines and sines of every token's rotary angles, float32; one angle turns one pair of neighbouring channels."""

    cos: Float[Array, "s h2"]
    sin: Float[Array, "s h2"]


def rope_table(ids: np.ndarray, axes: tuple[int, ...], theta: float) -> Rope:
    """Rotary angles of tokens at the positions ``ids``.

    Computed on the host in float64: positions follow from the sizes of the images alone, and the recordings'
    accuracy needs more than float32 angles.

    Args:
        ids: [s, axes] positions (0, row, column).
        axes: channels of a head that each axis turns, h in all.
        theta: base of the frequencies.
    """
    angles = []
    for position, channels in zip(np.asarray(ids, np.float64).T, axes, strict=True):
        frequencies = theta ** -(np.arange(0, channels, 2, dtype=np.float64) / channels)
        angles.append(np.outer(position, frequencies))
    angle = np.concatenate(angles, axis=-1)
    return Rope(jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))


def apply_rope(x: Float[Array, "b s n h"], rope: Rope) -> Float[Array, "b s n h"]:
    """Turns the channel pairs (0, 1), (2, 3), ... of every head, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = rope.cos[:, None, :], rope.sin[:, None, :]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def time_frequencies() -> np.ndarray:
    """The [128] angular frequencies of the time features, float32.

    The angles are large, so the last bit of a frequency shows: rounded to float32 before and after the exponential, as
    PyTorch does. PyTorch's own exponential is off the nearest number by one bit at a few of them, and at which ones
    depends on its processor: at a guidance of 10 that bit moves a feature by 2e-4.
    """
    half = TIME_FEATURES // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(MAX_PERIOD)) / np.float32(half)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def time_features(t: Float[Array, "*b"]) -> Float[Array, "*b 256"]:
    """Sinusoidal features of times (or guidances) in the network's units, cosines first, float32."""
    angle = (t.astype(jnp.float32) * TIME_SCALE)[..., None] * time_frequencies()
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class MLPEmbedder(nnx.Module):
    """linear, SiLU, linear."""

    def __init__(self, d_in: int, d: int, *, rngs: nnx.Rngs, dtype: Dtype):
        self.linear_1 = Linear(d_in, d, rngs=rngs, dtype=dtype)
        self.linear_2 = Linear(d, d, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b k f"], lora: LoraRows = None) -> Float[Array, "b k d"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x, lora)), lora)
