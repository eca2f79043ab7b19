"""The FLUX transformer: real sizes, flags that don't fit, attention's implementations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from rflow_jax.errors import InputError
from rflow_jax.flow import rope_for
from rflow_jax.models.attention import attend
from rflow_jax.models.flux.config import ConditionFlags, FluxConfig, forward_flops
from rflow_jax.models.flux.transformer import FluxTransformer, abstract_flux
from rflow_jax.models.lora import init_lora, without_condition_effect
from tests.kit.compare import relative_error

TINY = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=6,
    axes_dims_rope=(2, 2, 4),
)


# Checked against diffusers on the meta device in tests/parity/test_make_flux.py.
@pytest.mark.parametrize(("guidance", "parameters"), [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_real_sizes(guidance, parameters):
    network = abstract_flux(FluxConfig(guidance_embeds=guidance), jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(network))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_abstract_networks_are_the_real_ones():
    real = nnx.to_flat_state(nnx.state(FluxTransformer(TINY, rngs=nnx.Rngs(0))))
    abstract = nnx.to_flat_state(nnx.state(abstract_flux(TINY)))
    assert [(path, v.shape, v.dtype) for path, v in real] == [(path, v.shape, v.dtype) for path, v in abstract]


def test_cost_of_the_real_steps():
    # The figures that the project's targets are stated with: 74.4 and 94.9 TFLOP.
    assert forward_flops(FluxConfig(), text=512, image=4096) == pytest.approx(74.4e12, rel=5e-3)
    assert forward_flops(FluxConfig(), text=512, image=4096, condition=1024) == pytest.approx(94.9e12, rel=5e-3)


@pytest.fixture(scope="module")
def network():
    return FluxTransformer(TINY, rngs=nnx.Rngs(0))


def _call(network, condition_grid=(1, 2), image_grid=(2, 2), **how):
    rows, columns = image_grid
    keys = jax.random.split(jax.random.key(0), 4)
    condition = jax.random.normal(keys[3], (1, condition_grid[0] * condition_grid[1], 16))
    return network(
        jax.random.normal(keys[0], (1, rows * columns, 16)),
        jax.random.normal(keys[1], (1, 3, 12)),
        jax.random.normal(keys[2], (1, 6)),
        jnp.full(1, 0.5),
        rope=rope_for(TINY, 3, image_grid, condition_grid),
        condition=condition,
        **{"guidance": jnp.full(1, 3.5)} | how,
    )


def test_a_scale_of_one_is_no_scale(network):
    with_scale = _call(network, condition_scale=jnp.float32(1.0))
    assert relative_error(with_scale, _call(network)) < 1e-6
    assert relative_error(_call(network, condition_scale=jnp.float32(3.0)), _call(network)) > 1e-3


def test_flags_that_do_not_fit_are_refused(network):
    apart = ConditionFlags(union_cond_attn=False)
    with pytest.raises(InputError, match="union_cond_attn"):
        _call(network, flags=apart, condition_scale=jnp.float32(0.5))
    with pytest.raises(InputError, match="as many condition tokens"):
        _call(network, flags=ConditionFlags(add_cond_attn=True))
    with pytest.raises(InputError, match="takes a guidance"):
        _call(network, guidance=None)


def test_adapters_without_effect_on_condition_tokens_are_those_without_a_gradient():
    config = dataclasses.replace(TINY, num_layers=2, num_single_layers=2)
    network = init_lora(FluxTransformer(config, rngs=nnx.Rngs(0)), 1, pattern=".*", rngs=nnx.Rngs(1))
    graph, matrices, rest = nnx.split(network, lambda path, _: path[-1] == "lora_b", ...)
    gradient = jax.jit(jax.grad(lambda b: jnp.sum(jnp.square(_call(nnx.merge(graph, b, rest))))))(matrices)
    moved = {".".join(map(str, path[:-1])): np.any(leaf[...]) for path, leaf in nnx.to_flat_state(gradient)}
    idle, unread = without_condition_effect(list(moved), config.num_single_layers)
    assert len(moved) > len(idle) + len(unread) > 0
    assert {path for path, moves in moved.items() if not moves} == {*idle, *unread}


@pytest.mark.parametrize(
    "bad", [{"axes_dims_rope": [4, 6, 6]}, {"_class_name": "SD3Transformer2DModel"}, {"patch_size": 2}]
)
def test_other_networks_are_refused(bad):
    with pytest.raises(InputError, match="transformer config"):
        FluxConfig.from_json({"in_channels": 64} | bad)


def _qkv(s, k, n=2, h=16):
    keys = jax.random.split(jax.random.key(1), 4)
    q = jax.random.normal(keys[0], (2, s, n, h))
    return q, *(jax.random.normal(key, (2, k, n, h)) for key in keys[1:3]), jax.random.normal(keys[3], (1, 1, s, k))


@pytest.mark.parametrize("with_bias", [False, True])
def test_xla_attention_equals_the_reference(with_bias):
    q, k, v, bias = _qkv(7, 11)
    bias = bias if with_bias else None
    assert relative_error(attend(q, k, v, bias=bias, impl="xla"), attend(q, k, v, bias=bias, impl="reference")) < 1e-6


@pytest.mark.parametrize("with_bias", [False, True])
def test_flash_attention_equals_the_reference(with_bias):
    # The TPU kernel, interpreted; neither length is a multiple of its block.
    q, k, v, bias = _qkv(300, 620, n=1, h=128)
    bias = bias if with_bias else None
    with pltpu.force_tpu_interpret_mode():
        flash = attend(q, k, v, bias=bias, impl="flash")
    assert relative_error(flash, attend(q, k, v, bias=bias, impl="reference")) < 2e-5


def test_attention_sees_every_key():
    q, k, v, _ = _qkv(5, 9)
    moved = attend(q, k, v.at[:, -1].add(1.0))
    assert np.all(np.asarray(moved != attend(q, k, v)))
