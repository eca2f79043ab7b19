"""The transformer's shortcuts, kernels in parts and the last block for the image alone, equal the long way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.models.flux.split import split_kernels
from rflow_jax.models.flux.transformer import FluxGraph, FluxTransformer
from rflow_jax.models.layers import ALL_ROWS, Linear, SplitKernel, each_linear
from rflow_jax.models.lora import init_lora, linears
from tests.kit.compare import relative_error
from tests.unit.models.test_flux import TINY, _call


def with_lora(network, pattern=".*"):
    """Adapters that do something: B is not zero."""
    init_lora(network, 2, pattern=pattern, rngs=nnx.Rngs(1))
    for seed, linear in enumerate(linears(network).values()):
        if linear.lora_b is not None:
            linear.lora_b.set_value(jax.random.normal(jax.random.key(seed), linear.lora_b.shape))
    return network


@pytest.mark.parametrize("rows", [None, ALL_ROWS, slice(3, None)])
def test_linears_with_one_product_for_all_adapters_equal_each_alone(rows):
    class Three(nnx.Module):
        def __init__(self):
            self.a, self.b, self.c = (Linear(6, width, rngs=nnx.Rngs(width)) for width in (4, 5, 7))

    three = with_lora(Three(), "a|c")
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    chosen = (three.a, three.b, three.c)
    for y, linear in zip(each_linear(chosen, x, rows), chosen, strict=True):
        expected = np.array(x @ linear.kernel[...])
        if rows is not None and linear.lora_a is not None:
            change = np.asarray(x @ linear.lora_a[...] @ linear.lora_b[...]) * np.asarray(linear.lora_scale[...])
            expected[:, rows] += change[:, rows]
        assert relative_error(y, expected) < 2e-5
        assert relative_error(linear(x, rows), expected) < 2e-5


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ({}, {}),
        ({"latent_lora": True}, {"condition_scale": jnp.float32(3.0)}),
        ({"union_cond_attn": False}, {}),
        ({"add_cond_attn": True}, {"condition_grid": (2, 2), "condition_scale": jnp.float32(0.5)}),
    ],
)
def test_the_image_alone_and_split_kernels_give_what_stacked_blocks_give(flags, options):
    # Stacked blocks compute all rows of the last one, with whole kernels.
    config = dataclasses.replace(TINY, num_single_layers=2)
    network = with_lora(FluxTransformer(config, rngs=nnx.Rngs(0)))
    state, flags = nnx.state(network), ConditionFlags(**flags)
    stacked = FluxGraph.of(network, scan_blocks=True).merge(jax.tree.map(jnp.copy, state))
    expected = _call(stacked, flags=flags, **options)
    assert relative_error(_call(network, flags=flags, **options), expected) < 2e-5
    split = FluxGraph.of(network, scan_blocks=False).merge(split_kernels(state, config))
    kernel = split.single_blocks[0].out.kernel.get_value()
    assert isinstance(kernel, SplitKernel)
    assert [part.shape[0] for part in kernel.parts] == [config.width, config.mlp_width]
    assert relative_error(_call(split, flags=flags, **options), expected) < 2e-5
