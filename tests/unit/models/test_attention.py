"""Attention: causal, with padded keys, with fewer heads of keys; every implementation says the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rflow_jax.models.attention import attend
from rflow_jax.models.qwen2.model import KeyValue, attend_one
from tests.kit.compare import relative_error

LENGTHS = np.asarray([5, 1, 9], np.int32)


@pytest.fixture
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (3, 9, heads, 8)) for key, heads in zip(keys, (6, 2, 2), strict=True))


def written_out(q, k, v, causal, lengths):
    """One query, one head and one sample at a time."""
    out = np.zeros(q.shape)
    for b, s, n in np.ndindex(q.shape[:3]):
        seen = min(s + 1 if causal else k.shape[1], k.shape[1] if lengths is None else lengths[b])
        own = n // (q.shape[2] // k.shape[2])
        scores = np.asarray(k[b, :seen, own], np.float64) @ np.asarray(q[b, s, n], np.float64) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, s, n] = weights @ np.asarray(v[b, :seen, own], np.float64) / weights.sum()
    return out


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize(("causal", "lengths"), [(True, None), (False, LENGTHS), (True, LENGTHS), (False, None)])
def test_masks_and_shared_keys(qkv, impl, causal, lengths):
    given = None if lengths is None else jnp.asarray(lengths)
    with jax.default_matmul_precision("highest"):
        got = attend(*qkv, causal=causal, lengths=given, impl=impl)
    assert relative_error(got, written_out(*qkv, causal, lengths)) < 1e-6


def test_the_kernel_of_tpus(qkv):
    """Interpreted on this CPU."""
    for causal, lengths in ((True, None), (False, LENGTHS)):
        given = None if lengths is None else jnp.asarray(lengths)
        with pltpu.force_tpu_interpret_mode():
            got = attend(*qkv, causal=causal, lengths=given, impl="flash")
        assert relative_error(got, written_out(*qkv, causal, lengths)) < 2e-5


def test_one_token_over_a_cache(qkv):
    """A step sees the visible places only, as the last row of the whole does."""
    q, k, v = qkv
    cache = KeyValue(k.swapaxes(1, 2), v.swapaxes(1, 2)).grown(12)
    visible = jnp.arange(12) < jnp.asarray(LENGTHS)[:, None]
    with jax.default_matmul_precision("highest"):
        got = attend_one(q[:, -1:], cache, visible)
    assert relative_error(got, written_out(q, k, v, False, LENGTHS)[:, -1:]) < 1e-6
