"""The layers that all networks share: a linear with an optional LoRA, norms, embeddings, self-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.partitioning import SEQUENCE, constrain, has_axis
from rflow_jax.typing import Array, Bool, Float

Module = TypeVar("Module", bound=nnx.Module)
# The rows (tokens, on axis -2) that a linear's LoRA acts on; None: none. ``slice(start, None)``: the last rows.
LoraRows = slice | None
ALL_ROWS = slice(None)


class SplitKernel(NamedTuple):
    """A kernel's rows in several arrays, one for each part of an input that is never joined.

    A program that cuts an array it is given copies the pieces, so they are cut once, outside of it.
    """

    parts: tuple[Float[Array, "_ o"], ...]


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
        return self.of_parts((x,), lora)

    def of_parts(self, parts: Sequence[Float[Array, "*b s _"]], lora: LoraRows = None) -> Float[Array, "*b s o"]:
        """As if called with the parts joined along their channels, which a :class:`SplitKernel` spares."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, SplitKernel):
            y = _sum_of_products(parts, kernel.parts)
        else:
            parts = (parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1),)
            y = matmul(parts[0], kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if lora is None or self.lora_a is None:
            return y
        return y + _low_rank_terms((self,), parts, lora)[0]


def each_linear(linears: Sequence[Linear], x: Float[Array, "*b s d"], lora: LoraRows) -> list[Float[Array, "*b s _"]]:
    """``linear(x, lora)`` of several linears, whose matrices A take one product."""
    outputs = [linear(x) for linear in linears]
    adapted = [i for i, linear in enumerate(linears) if linear.lora_a is not None]
    if adapted and lora is not None:
        terms = _low_rank_terms([linears[i] for i in adapted], (x,), lora)
        for i, term in zip(adapted, terms, strict=True):
            outputs[i] = outputs[i] + term
    return outputs


def _low_rank_terms(linears: Sequence[Linear], parts: Sequence[Float[Array, "*b s _"]], rows: slice) -> list[Array]:
    """``scale * x @ lora_a @ lora_b`` of linears with an adapter, for an input in parts; 0 in other rows."""
    start = rows.start or 0
    # If the sequence is cut, few devices have these rows: all of them compute.
    masked = start > 0 and has_axis(SEQUENCE)
    if not masked:
        parts = [part[..., start:, :] for part in parts]
    dtype = parts[0].dtype
    # Replicated: the compiler would otherwise move activations to the parts of a small matrix.
    a, b = ([constrain(getattr(m, name)[...].astype(dtype)) for m in linears] for name in ("lora_a", "lora_b"))
    all_a = jnp.concatenate(a, axis=1) if len(a) > 1 else a[0]
    ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
    low = _sum_of_products(parts, jnp.split(all_a, ends))
    terms = []
    lows = jnp.split(low, np.cumsum([matrix.shape[1] for matrix in a])[:-1], axis=-1)
    for linear, own, lora_b in zip(linears, lows, b, strict=True):
        assert linear.lora_scale is not None
        # The scale stays float32: bfloat16 may not represent alpha / rank.
        term = jnp.dot((own * linear.lora_scale[...]).astype(dtype), lora_b)
        if masked:
            term = jnp.where(jnp.arange(term.shape[-2])[:, None] >= start, term, 0)
        elif start:
            # Zeros around it: the padding becomes a part of whatever reads the sum, where an update in place would be a
            # kernel of its own.
            term = jnp.pad(term, [(0, 0)] * (term.ndim - 2) + [(start, 0), (0, 0)])
        terms.append(term)
    return terms


def _sum_of_products(parts: Sequence[Array], kernels: Sequence[Any]) -> Array:
    first, *rest = (matmul(part, kernel) for part, kernel in zip(parts, kernels, strict=True))
    return sum(rest, first)


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
