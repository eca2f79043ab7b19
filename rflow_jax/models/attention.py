"""Attention behind one function, whatever computes it."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rflow_jax.typing import Array, Float, Int

AttentionImpl = Literal["auto", "reference", "xla", "cudnn", "flash"]
FLASH_BLOCK = 512  # tokens a tile of the TPU kernel; sequences are padded to a multiple of it
_UNSEEN = float(jnp.finfo(jnp.float32).min)


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

    Keys and values may have fewer heads than the queries, each shared by as many neighbouring ones.

    Args:
        bias: added to the scaled logits.
        causal: a query sees the keys up to its own place.
        lengths: keys from this place on are padding, which nobody sees; from 1.
        impl: ``reference`` (float32 throughout), ``xla`` (``jax.nn.dot_product_attention``), ``cudnn`` (its fused
            kernel: GPU, 16-bit), ``flash`` (Pallas kernel for TPU), or ``auto``: the fastest for the default
            device and this dtype.
    """
    chosen = _fastest(q) if impl == "auto" else impl
    if chosen == "reference":
        return _reference(q, k, v, bias, causal, lengths)
    if chosen == "flash":
        return _flash(q, k, v, bias, causal, lengths)
    out = jax.nn.dot_product_attention(
        q, k, v, bias=bias, is_causal=causal, key_value_seq_lengths=lengths, implementation=chosen
    )
    return jnp.asarray(out)


def _fastest(q: Array) -> Literal["reference", "cudnn", "flash"]:
    backend = jax.default_backend()
    if backend == "gpu" and q.dtype.itemsize == 2:
        return "cudnn"
    # A sequence shorter than a tile, such as a window of a picture, would be mostly padding.
    return "flash" if backend == "tpu" and q.shape[1] >= FLASH_BLOCK else "reference"


def _reference(q: Array, k: Array, v: Array, bias: Array | None, causal: bool, lengths: Array | None) -> Array:
    k, v = _as_many_heads(q, k), _as_many_heads(q, v)
    logits = jnp.einsum("bsnh,bknh->bnsk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    places = jnp.arange(k.shape[1])
    if causal:
        logits = jnp.where(places <= jnp.arange(q.shape[1])[:, None], logits, _UNSEEN)
    if lengths is not None:
        logits = jnp.where(places < lengths[:, None, None, None], logits, _UNSEEN)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bnsk,bknh->bsnh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(q.dtype)


def _flash(q: Array, k: Array, v: Array, bias: Array | None, causal: bool, lengths: Array | None) -> Array:
    from jax.experimental.pallas.ops.tpu import (
        flash_attention as tpu,
    )  # only where it is used: slow to import

    b, s, n, h = q.shape
    keys = k.shape[1]
    k, v = _as_many_heads(q, k), _as_many_heads(q, v)
    blocks = tpu.BlockSizes(block_q=FLASH_BLOCK, block_k_major=FLASH_BLOCK, block_k=FLASH_BLOCK, block_b=1)
    # Padding belongs to a segment of its own, which no real token attends to.
    ends = keys if lengths is None else lengths[:, None]
    segments = tpu.SegmentIds(q=_padding_segment(b, s, s), kv=_padding_segment(b, keys, ends))
    if bias is not None:
        # The kernel scales the logits after it has added the bias.
        bias = jnp.broadcast_to(bias * h**0.5, (b, n, s, keys))
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, -s % FLASH_BLOCK), (0, -keys % FLASH_BLOCK)))
    heads_first = (_pad_tokens(x).swapaxes(1, 2) for x in (q, k, v))
    out = tpu.flash_attention(
        *heads_first, ab=bias, segment_ids=segments, causal=causal, sm_scale=h**-0.5, block_sizes=blocks
    )
    return out.swapaxes(1, 2)[:, :s]


def _as_many_heads(q: Array, x: Array) -> Array:
    return x if x.shape[2] == q.shape[2] else jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)


def _pad_tokens(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % FLASH_BLOCK), (0, 0), (0, 0)))


def _padding_segment(b: int, tokens: int, ends: int | Array) -> Array:
    padded = tokens + -tokens % FLASH_BLOCK
    return jnp.broadcast_to((jnp.arange(padded) >= ends).astype(jnp.int32), (b, padded))
