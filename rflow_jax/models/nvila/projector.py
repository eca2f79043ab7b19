"""From the tower's patches to the language model's tokens: nine patches become one token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.layers import LayerNorm, Linear
from rflow_jax.typing import Array, Float

BLOCK = 3  # patches a side that become one token
EPS = 1e-5


class Projector(nnx.Module):
    """3 x 3 space-to-depth, then three linears with norms and exact GELU between.

    Source: ``mlp_downsample_3x3_fix`` of VILA.
    """

    def __init__(self, d_vision: int, d: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        deep, middle = d_vision * BLOCK**2, d_vision * BLOCK
        self.norm_in = LayerNorm(deep, eps=EPS, dtype=dtype)
        self.reduce = Linear(deep, middle, rngs=rngs, dtype=dtype)
        self.norm = LayerNorm(middle, eps=EPS, dtype=dtype)
        self.project = Linear(middle, d, rngs=rngs, dtype=dtype)
        self.out = Linear(d, d, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b s e"]) -> Float[Array, "b i d"]:
        """Features of a square of patches, row by row -> image tokens, row by row."""
        return self.stages(x)[-1]

    def stages(self, x: Float[Array, "b s e"]) -> list[Float[Array, "b i _"]]:
        """What leaves the space-to-depth and each of the seven layers behind it."""
        stages = [space_to_depth(x)]
        for layer in (self.norm_in, self.reduce, _gelu, self.norm, self.project, _gelu, self.out):
            stages.append(layer(stages[-1]))
        return stages


def space_to_depth(x: Float[Array, "b s e"]) -> Float[Array, "b i f"]:
    """Each block of patches side by side in one vector, rows first; zeros fill the last blocks of rows and columns."""
    b, s, e = x.shape
    side = round(s**0.5)
    blocks = -(-side // BLOCK)
    fill = blocks * BLOCK - side
    square = jnp.pad(x.reshape(b, side, side, e), ((0, 0), (0, fill), (0, fill), (0, 0)))
    square = square.reshape(b, blocks, BLOCK, blocks, BLOCK, e).transpose(0, 1, 3, 2, 4, 5)
    return square.reshape(b, blocks**2, BLOCK**2 * e)


def tokens_of(grid: int) -> int:
    """Image tokens of a picture of ``grid`` x ``grid`` patches."""
    return (-(-grid // BLOCK)) ** 2


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)
