"""Kernels in 8 bits: how far the products move, and what stays as it is."""

from __future__ import annotations

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from rflow_jax.errors import InputError
from rflow_jax.models.layers import Linear
from rflow_jax.models.lora import linears
from rflow_jax.models.quantization import quantize
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2.model import Qwen2

# The largest error of a number as a part of the largest in its column: half a step of 127; of fp8's numbers, which
# have three bits after the first, half of 1/8 of the number itself.
HALF_STEP = {"int8": 0.5 / 127, "fp8": 1 / 16}


def linear(d_in: int, d_out: int, seed: int) -> Linear:
    made = Linear(d_in, d_out, rngs=nnx.Rngs(seed))
    kernel = np.random.default_rng(seed).standard_normal((d_in, d_out)) * 10.0 ** np.arange(d_out)
    made.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    return made


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["int8", "fp8"]), st.integers(1, 40), st.integers(1, 6), st.integers(0, 99))
def test_products_move_by_no_more_than_the_rounding_of_each_column(how, d_in, d_out, seed):
    """Columns may differ by powers of ten: each has a scale of its own."""
    layer = linear(d_in, d_out, seed)
    kernel = np.asarray(layer.kernel.get_value())
    x = np.random.default_rng(seed + 1).standard_normal((3, d_in)).astype(np.float32)
    want = x @ kernel
    got = np.asarray(quantize(layer, how)(jnp.asarray(x)))
    allowed = np.abs(x).sum(axis=1, keepdims=True) * np.abs(kernel).max(axis=0) * HALF_STEP[how]
    assert (np.abs(got - want) <= 1.01 * allowed + 1e-6 * np.abs(want)).all()


@pytest.mark.parametrize(("how", "dtype"), [("int8", jnp.int8), ("fp8", jnp.float8_e4m3fn)])
def test_a_decoder_is_kept_in_8_bits_and_answers_nearly_as_before(how, dtype):
    config = Qwen2Config(64, 64, 96, 2, 4, 2)
    model = Qwen2(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 9, 64))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))

    @jax.jit
    def logits(state):
        network = nnx.merge(graph, state)
        return network.logits(network(x, positions))

    graph, state = nnx.split(model)
    before = logits(state)
    embedding = np.asarray(model.embed.embedding[...])
    graph, state = nnx.split(quantize(model, how, r"blocks\..*|head"))
    after = logits(state)
    assert {layer.kernel.get_value().qvalue.dtype for layer in linears(model).values()} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(model.embed.embedding[...], embedding)
    correlation = np.corrcoef(np.ravel(before), np.ravel(after))[0, 1]
    assert 0.99 < correlation < 1


def test_nothing_is_asked_nothing_changes():
    layer = linear(4, 3, 0)
    kernel = layer.kernel.get_value()
    assert quantize(layer, None).kernel.get_value() is kernel


def test_a_pattern_without_a_linear_is_told():
    config = Qwen2Config(64, 32, 48, 1, 2, 1)
    model = Qwen2(config, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="no linear of this network matches 'vision"):
        quantize(model, "int8", r"vision\..*")


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name == "qwix":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"int8 needs qwix \(pip install 'rflow_jax\[quantized\]'\)"):
        quantize(linear(4, 3, 0), "int8")
