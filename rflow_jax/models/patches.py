"""The first layer of a vision transformer: squares of pixels -> vectors."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.layers import init_kernel
from rflow_jax.typing import Array, Float


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
