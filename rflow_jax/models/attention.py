"""Attention behind one function, for all kernels and any number of devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rflow_jax.models.options import AttentionImpl
from rflow_jax.models.partitioning import BATCH, HEADS, SEQUENCE, TOKENS, auto_axes, dividing, target_platform
from rflow_jax.typing import Array, Float, Int

FLASH_BLOCK = 512  # tokens in a tile of the TPU kernels; sequences are padded to a multiple of it
_LANES = 128  # of a TPU's vector registers; head dimensions are padded to a multiple of it
_MASKED = float(jnp.finfo(jnp.float32).min)
# (q, k, v, bias, lengths) -> as q; runs on one device.
_Kernel = Callable[[Array, Array, Array, Array | None, Array | None], Array]


def attend(
    q: Float[Array, "b s n h"],
    k: Float[Array, "b k kv h"],
    v: Float[Array, "b k kv h"],
    *,
    bias: Float[Array, "#b #n s k"] | None = None,
    causal: bool = False,
    lengths: Int[Array, " b"] | None = None,
    impl: AttentionImpl = "auto",
) -> Float[Array, "b s n h"]:
    """``softmax(q k^T / sqrt(h) + bias) v`` for each head.

    Keys and values may have fewer heads than the queries, each shared by as many neighbouring ones. On a mesh every
    device computes its own samples and heads (:mod:`rflow_jax.models.partitioning`).

    Args:
        bias: added to the scaled logits.
        causal: a query sees the keys up to its own position.
        lengths: keys from this position on are padding, which no query sees; at least 1.
        impl: ``reference`` (float32 throughout), ``xla`` (``jax.nn.dot_product_attention``), ``cudnn`` (its fused
            kernel: GPU, 16-bit), ``flash`` (Pallas kernels for TPU, interpreted elsewhere), or ``auto``: the fastest
            for the target devices and this dtype.
    """
    chosen = _fastest(q) if impl == "auto" else impl
    if chosen == "reference":
        return _reference(q, k, v, bias, causal, lengths)
    if chosen == "xla":
        return _dot_product(q, k, v, bias, lengths, causal=causal, implementation="xla")
    # The rest are kernels, which no compiler can partition.
    if chosen == "cudnn":
        kernel: _Kernel = partial(_dot_product, causal=causal, implementation="cudnn")
    else:
        kernel = partial(_splash if bias is None else _flash, causal=causal)
    return _per_shard(kernel, q, k, v, bias, lengths, causal)


def _fastest(q: Array) -> Literal["reference", "cudnn", "flash"]:
    platform = target_platform()
    if platform == "gpu" and q.dtype.itemsize == 2:
        return "cudnn"
    # A sequence shorter than a tile, such as a window of a picture, would be mostly padding.
    return "flash" if platform == "tpu" and q.shape[1] >= FLASH_BLOCK else "reference"


def _per_shard(
    kernel: _Kernel, q: Array, k: Array, v: Array, bias: Array | None, lengths: Array | None, causal: bool
) -> Array:
    """Runs a kernel on each device of the ambient mesh, for its own samples and heads.

    Tokens that are cut over ``sequence`` are exchanged for heads on the way in. If too few heads are left for that,
    each device takes its own queries and all keys.
    """
    axes = auto_axes()
    if not axes:
        return kernel(q, k, v, bias, lengths)
    batch = dividing(BATCH, q.shape[0], axes, "samples")
    tokens = None
    heads = dividing(HEADS, q.shape[2], axes)
    if axes.get(SEQUENCE, 1) > 1 and SEQUENCE not in (heads or ()):
        tokens = None if causal else dividing(TOKENS, q.shape[1], axes)
    dividing(HEADS if tokens is None else HEADS[:1], q.shape[2], axes, "attention heads")
    if k.shape[2] % math.prod(axes[axis] for axis in heads or ()):
        k, v = _as_many_heads(q, k), _as_many_heads(q, v)
    own, whole = PartitionSpec(batch, tokens, heads), PartitionSpec(batch, None, heads)
    bias_spec = None
    if bias is not None:
        # Dimensions of one entry stand for all samples or heads.
        bias_spec = PartitionSpec(batch if bias.shape[0] > 1 else None, heads if bias.shape[1] > 1 else None, tokens)
    specs = (own, whole, whole, bias_spec, PartitionSpec(batch))
    # Kernels need every axis to be mapped over, also those of size 1.
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=own, axis_names=set(axes), check_vma=False)
    return mapped(q, k, v, bias, lengths)


def _reference(q: Array, k: Array, v: Array, bias: Array | None, causal: bool, lengths: Array | None) -> Array:
    k, v = _as_many_heads(q, k), _as_many_heads(q, v)
    logits = jnp.einsum("bsnh,bknh->bnsk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    positions = jnp.arange(k.shape[1])
    if causal:
        logits = jnp.where(positions <= jnp.arange(q.shape[1])[:, None], logits, _MASKED)
    if lengths is not None:
        logits = jnp.where(positions < lengths[:, None, None, None], logits, _MASKED)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bnsk,bknh->bsnh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(q.dtype)


def _dot_product(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    lengths: Array | None,
    *,
    causal: bool,
    implementation: Literal["xla", "cudnn"],
) -> Array:
    out = jax.nn.dot_product_attention(
        q, k, v, bias=bias, is_causal=causal, key_value_seq_lengths=lengths, implementation=implementation
    )
    return jnp.asarray(out)


def _splash(q: Array, k: Array, v: Array, bias: None, lengths: Array | None, *, causal: bool) -> Array:
    """JAX's splash attention: the faster of the TPU kernels, which takes masks but no bias."""
    # Imported here because slow to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    on_tpu = target_platform() == "tpu"
    b, s, n, h = q.shape
    keys = k.shape[1]
    q, k, v = (_heads_first(x) for x in (q * h**-0.5, k, v))
    shape = q.shape[2], k.shape[2]
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    sizes = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * n),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**dict.fromkeys((*sizes, "block_q_dq", "block_kv_dq"), FLASH_BLOCK)),
        interpret=not on_tpu,
    )
    segments = None
    if lengths is not None or shape != (s, keys):
        segments = splash.SegmentIds(*_padding_segments(b, s, keys, lengths))
    # Interpreted one by one: JAX's simulator of TPUs does not know the grid of a batch.
    compute: Any = kernel
    out = (jax.vmap if on_tpu else _one_by_one)(compute)(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :s, :, :h]


def _one_by_one(function: Callable[..., Array]) -> Callable[..., Array]:
    def stacked(first: Array, *rest: Any) -> Array:
        samples = (jax.tree.map(lambda x, i=i: x[i], (first, *rest)) for i in range(first.shape[0]))
        return jnp.stack([function(*sample) for sample in samples])

    return stacked


def _flash(q: Array, k: Array, v: Array, bias: Array, lengths: Array | None, *, causal: bool) -> Array:
    """JAX's flash attention for TPU, which takes a bias, written out for all samples and heads."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    b, s, n, h = q.shape
    keys = k.shape[1]
    k, v = _as_many_heads(q, k), _as_many_heads(q, v)
    # The kernel scales the logits after it has added the bias.
    bias = jnp.broadcast_to(bias * h**0.5, (b, n, s, keys))
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, -s % FLASH_BLOCK), (0, -keys % FLASH_BLOCK)))
    sizes = ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv")
    sizes += ("block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq")
    out = flash.flash_attention(
        *(_heads_first(x) for x in (q, k, v)),
        ab=bias,
        segment_ids=flash.SegmentIds(*_padding_segments(b, s, keys, lengths)),
        causal=causal,
        sm_scale=h**-0.5,
        block_sizes=flash.BlockSizes(block_b=1, **dict.fromkeys(sizes, FLASH_BLOCK)),
    )
    return out.swapaxes(1, 2)[:, :s, :, :h]


def _as_many_heads(q: Array, x: Array) -> Array:
    return x if x.shape[2] == q.shape[2] else jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)


def _heads_first(x: Float[Array, "b s n h"]) -> Float[Array, "b n _ _"]:
    """Heads before tokens, tokens and channels padded with zeros to whole tiles."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % FLASH_BLOCK), (0, 0), (0, -x.shape[3] % _LANES))).swapaxes(1, 2)


def _padding_segments(b: int, queries: int, keys: int, lengths: Array | None) -> tuple[Array, Array]:
    """Padding belongs to a segment of its own, which no real token attends to."""

    def segment(tokens: int, end: int | Array) -> Array:
        padded = tokens + -tokens % FLASH_BLOCK
        return jnp.broadcast_to((jnp.arange(padded) >= end).astype(jnp.int32), (b, padded))

    return segment(queries, queries), segment(keys, keys if lengths is None else lengths[:, None])
