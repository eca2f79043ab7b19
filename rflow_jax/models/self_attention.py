"""Self-attention of the text encoders: few tokens, a bias or a mask, scores and softmax in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.layers import Linear
from rflow_jax.typing import Array, Bool, Float


class SelfAttention(nnx.Module):
    """Multi-head self-attention over [b, t, d].

    Attributes:
        scale: factor of the scores before the bias (T5 has 1).
    """

    def __init__(
        self,
        d: int,
        heads: int,
        head_dim: int,
        *,
        scale: float,
        use_bias: bool,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
    ):
        inner = heads * head_dim
        self.heads = heads
        self.scale = scale
        self.q = Linear(d, inner, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.k = Linear(d, inner, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.v = Linear(d, inner, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.out = Linear(inner, d, use_bias=use_bias, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        bias: Float[Array, "n t t"] | None = None,
        mask: Bool[Array, "#b #n #t t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """``bias`` is added to the scores; a query does not see the keys where ``mask`` is False."""
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) * self.scale
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        y = jnp.einsum("bnqk,bknh->bqnh", weights, v)
        return self.out(y.reshape(*x.shape[:2], -1))

    def _split(self, y: Array) -> Array:
        return y.reshape(*y.shape[:2], self.heads, -1)
