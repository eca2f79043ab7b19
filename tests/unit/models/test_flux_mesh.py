"""The transformer on meshes of eight fake devices: outputs and gradients of its LoRA are those of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from rflow_jax.flow import rope_for
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxGraph, FluxTransformer
from rflow_jax.models.lora import init_lora
from rflow_jax.parallel.mesh import BATCH, MeshConfig, make_mesh, traced_on
from rflow_jax.parallel.sharding import sharding_for
from tests.kit.compare import relative_error

CONFIG = FluxConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    pooled_projection_dim=16,
    axes_dims_rope=(2, 2, 4),
)
TEXT, IMAGE, CONDITION, B = 8, (4, 4), (2, 4), 4
# Every axis alone or with each other one; all sixteen were tried once, and take minutes.
SHAPES = [(2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 8, 1), (1, 1, 2, 4), (4, 1, 2, 1), (1, 4, 1, 2)]


@pytest.fixture(scope="module")
def network():
    """A network whose LoRA acts, with adapters of two ranks and none in one of the blocks."""
    network = FluxTransformer(CONFIG, rngs=nnx.Rngs(0))
    init_lora(network, 4, pattern=r"image_in|.*\.(mod|q|v|out|down|mlp)", rngs=nnx.Rngs(1))
    init_lora(network, 2, pattern=r"double_blocks\.1\..*\.[qkv]", rngs=nnx.Rngs(2))
    trainable = nnx.state(network, nnx.LoRAParam)
    nnx.update(network, jax.tree.map(lambda x: jax.random.normal(jax.random.key(3), x.shape) * 0.1, trainable))
    return network


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(7), 4)
    tokens = (IMAGE[0] * IMAGE[1], CONFIG.in_channels), (CONDITION[0] * CONDITION[1], CONFIG.in_channels)
    shapes = (*tokens, (TEXT, CONFIG.joint_attention_dim), (CONFIG.pooled_projection_dim,))
    arrays = [jax.random.normal(key, (B, *shape)) for key, shape in zip(keys, shapes, strict=True)]
    return *arrays, jnp.asarray([0.1, 0.4, 0.6, 0.9])


def output_and_gradients(network, inputs, mesh=None, scan_blocks=False, **how):
    graph = FluxGraph.of(network, scan_blocks=scan_blocks)
    _, trainable, frozen = nnx.split(network, nnx.LoRAParam, ...)
    rope = rope_for(CONFIG, TEXT, IMAGE, CONDITION)

    def loss(trainable, frozen, latents, condition, text, pooled, t):
        given = {"rope": rope, "guidance": jnp.ones(B), "condition": condition, **how}
        out = graph.merge(trainable, frozen)(latents, text, pooled, t, **given)
        return jnp.sum(out**2), out

    if mesh is not None:
        choose = sharding_for(mesh)

        def put(state):
            flat = nnx.to_flat_state(state)
            places = [choose(".".join(map(str, path)), variable.shape) for path, variable in flat]
            return nnx.from_flat_state(
                [
                    (p, v.replace(jax.device_put(v.get_value(), place)))
                    for (p, v), place in zip(flat, places, strict=True)
                ]
            )

        trainable, frozen = put(trainable), put(frozen)
        inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(*BATCH)))
    with jax.default_matmul_precision("highest"):
        (_, out), gradients = jax.jit(traced_on(mesh, jax.value_and_grad(loss, has_aux=True)))(
            trainable, frozen, *inputs
        )
    return jax.device_get((out, gradients))


@pytest.fixture(scope="module")
def alone(network, inputs):
    return output_and_gradients(network, inputs)


def error(got, want):
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(relative_error(a, b) if b.any() else float(abs(a).max()) for a, b in leaves)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_stacked_blocks_equal_those_written_out(network, inputs, alone, remat):
    """Adapters that some blocks lack, and ranks that differ, are filled up with zeros."""
    assert error(output_and_gradients(network, inputs, scan_blocks=True, remat=remat), alone) < 2e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mesh_gives_the_numbers_of_one_device(network, inputs, alone, shape):
    data, fsdp, sequence, tensor = shape
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence), jax.devices()[:8])
    scan_blocks = (data + fsdp + tensor) % 2 == 1  # either form on many meshes: all of both would take too long
    got = output_and_gradients(network, inputs, mesh, scan_blocks, remat="full")
    assert error(got, alone) < 2e-5
