"""Convolution, group normalisation and resampling of images laid out [batch, height, width, channels]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.layers import init_kernel
from rflow_jax.typing import Array, Float

# Zeros in front of and behind each of the two spatial axes.
Padding = tuple[tuple[int, int], tuple[int, int]]


class Conv(nnx.Module):
    """A 2-D convolution with bias.

    Attributes:
        kernel: [height, width, in, out].
        bias: [out].
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
    ):
        """``padding=None`` keeps the size at stride 1 (the same number of zeros on every side)."""
        around = (size // 2, size // 2)
        self.stride = stride
        self.padding = (around, around) if padding is None else padding
        self.kernel = nnx.Param(init_kernel(rngs.params(), (size, size, c_in, c_out), dtype))
        self.bias = nnx.Param(jnp.zeros((c_out,), dtype))

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height2 width2 o"]:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalises each group of channels over the whole image, computed in float32.

    Attributes:
        scale, bias: [channels].
    """

    def __init__(self, channels: int, groups: int, *, eps: float = 1e-6, dtype: Dtype = jnp.float32):
        self.groups = groups
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((channels,), dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), dtype))

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        y = x.astype(jnp.float32)
        centred = y - self._group_mean(y)
        y = centred * jax.lax.rsqrt(self._group_mean(jnp.square(centred)) + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)

    def _group_mean(self, y: Array) -> Array:
        """[b, height, width, c] -> [b, 1, 1, c], the same number for all channels of a group."""
        per_channel = jnp.mean(y, axis=(1, 2))
        per_group = jnp.mean(per_channel.reshape(y.shape[0], self.groups, -1), axis=-1)
        return jnp.repeat(per_group, y.shape[-1] // self.groups, axis=-1)[:, None, None, :]


def upsample_nearest(x: Float[Array, "b height width c"]) -> Float[Array, "b height2 width2 c"]:
    """Every pixel becomes a square of 2 x 2."""
    b, height, width, c = x.shape
    square = jnp.broadcast_to(x[:, :, None, :, None, :], (b, height, 2, width, 2, c))
    return square.reshape(b, 2 * height, 2 * width, c)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its size, written as one product.

    Attributes:
        kernel: [height, width, in, out].
        bias: [out], or None.
    """

    def __init__(
        self, c_in: int, d: int, size: int, *, use_bias: bool = True, rngs: nnx.Rngs, dtype: Dtype = jnp.float32
    ):
        self.kernel = nnx.Param(init_kernel(rngs.params(), (size, size, c_in, d), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((d,), dtype)) if use_bias else None)

    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b s d"]:
        """Patches in row-major order; what is left over at the right and the bottom is dropped."""
        size, _, c, d = self.kernel.shape
        rows, columns = x.shape[1] // size, x.shape[2] // size
        x = x[:, : rows * size, : columns * size].reshape(-1, rows, size, columns, size, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, size * size * c)
        y = jnp.dot(x, self.kernel[...].astype(x.dtype).reshape(-1, d))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
