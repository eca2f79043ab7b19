"""The layers that all networks share: a linear with an optional LoRA, norms, embeddings, self-attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.partitioning import SEQUENCE, constrain, has_axis
from rflow_jax.typing import Array, Bool, Float

Module = TypeVar("Module", bound=nnx.Module)
# The rows (tokens, on axis -2) that a linear's LoRA acts on; None: none. ``slice(start, None)``: the last rows.
LoraRows = slice | None
ALL_ROWS = slice(None)


class _OneKey(nnx.Rngs):
    """Stands in for ``nnx.Rngs`` if no number is ever drawn.

    The counters of real ``Rngs`` make tracing quadratic in the number of parameters: seconds for a large network.
    """

    def __init__(self) -> None:
        pass

    def params(self) -> Array:
        return jax.random.key(0)


def abstract(build: Callable[[Any], Module]) -> Module:
    """The network of ``build(rngs)`` as shapes, to be filled by a loader, compiled or counted."""
    return nnx.eval_shape(lambda: build(_OneKey()))


@partial(jax.jit, static_argnums=(1, 2))
def init_kernel(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
    """LeCun's normal initialisation; jitted, so that a thousand kernels of few shapes are traced a few times."""
    return jax.nn.initializers.lecun_normal()(key, shape, dtype)


class LoRAScale(nnx.Variable):
    """alpha / rank of one adapter: an array, so that exchanging LoRA files never recompiles."""


class Linear(nnx.Module):
    """``x @ kernel + bias``, plus ``scale * x @ lora_a @ lora_b`` on the rows that the call names.

    Whether the LoRA acts is an argument of the call and never state of the layer: condition tokens share
    this layer with image tokens in one product, and only the condition's rows get the low-rank term.

    Attributes:
        kernel: [in, out], see :func:`matmul`.
        bias: [out], or None.
        lora_a, lora_b, lora_scale: [in, r], [r, out] and a scalar, or None where no adapter is attached
            (see :func:`rflow_jax.models.lora.attach`).
    """

    def __init__(self, d_in: int, d_out: int, *, use_bias: bool = True, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.kernel = nnx.Param(init_kernel(rngs.params(), (d_in, d_out), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((d_out,), dtype)) if use_bias else None)
        self.lora_a = nnx.data(None)
        self.lora_b = nnx.data(None)
        self.lora_scale = nnx.data(None)

    def __call__(self, x: Float[Array, "*b s d"], lora: LoraRows = None) -> Float[Array, "*b s o"]:
        y = matmul(x, self.kernel.get_value())
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if lora is None or self.lora_a is None:
            return y
        start = lora.start or 0
        if start == 0:
            return y + self._low_rank(x)
        if has_axis(SEQUENCE):  # few of the sequence's devices have these rows: all of them compute
            return y + jnp.where(jnp.arange(x.shape[-2])[:, None] >= start, self._low_rank(x), 0)
        delta = self._low_rank(x[..., start:, :])
        # Updated in place: only the rows that change are read and written again.
        return jax.lax.dynamic_update_slice_in_dim(y, y[..., start:, :] + delta, start, axis=-2)

    def _low_rank(self, x: Array) -> Array:
        assert self.lora_a is not None
        assert self.lora_b is not None
        assert self.lora_scale is not None
        # Replicated: the compiler would otherwise move activations to the parts of a small matrix.
        a, b = (constrain(matrix[...].astype(x.dtype)) for matrix in (self.lora_a, self.lora_b))
        low = jnp.dot(x, a)
        # The scale stays float32: bfloat16 may not represent alpha / rank.
        scaled = (low * self.lora_scale[...]).astype(x.dtype)
        return jnp.dot(scaled, b)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32; ``affine`` adds a learned scale and bias."""

    def __init__(self, d: int, *, eps: float, affine: bool = True, dtype: Dtype = jnp.float32):
        self.eps = eps
        self.scale = nnx.data(nnx.Param(jnp.ones((d,), dtype)) if affine else None)
        self.bias = nnx.data(nnx.Param(jnp.zeros((d,), dtype)) if affine else None)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = layer_norm(x, self.eps)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` over the last axis, computed in float32."""

    def __init__(self, d: int, *, eps: float, dtype: Dtype = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((d,), dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of vectors: ``table[ids]``."""

    def __init__(self, rows: int, d: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (rows, d), dtype))

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...][ids]


def matmul(x: Float[Array, "*b s d"], kernel: Any, *, dtype: Dtype | None = None) -> Float[Array, "*b s o"]:
    """``x @ kernel``.

    Args:
        kernel: [in, out], or quantized by ``models/quantization.py``: its 8 bits are read as they are, and the sums
            scaled.
        dtype: of the result; None: that of ``x``.
    """
    if isinstance(kernel, jax.Array):
        return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=dtype)
    sums = jnp.dot(x, kernel.qvalue.astype(x.dtype), preferred_element_type=jnp.float32)
    return (sums * kernel.scale).astype(dtype or x.dtype)


def layer_norm(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b d"]:
    """LayerNorm without parameters over the last axis; the result is float32 whatever ``x`` is."""
    y = x.astype(jnp.float32)
    centred = y - jnp.mean(y, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)


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
