"""Rules of sharding, on eight fake devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

from rflow_jax import load_pipeline
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.parallel.sharding import fit, sharding_for
from rflow_jax.settings import Settings
from rflow_jax.weights.load import parameter_shapes

SETTINGS = Settings(
    height=32, width=32, num_inference_steps=2, condition_size=32, max_sequence_length=16, latent_lora=True
)


def _mesh(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_rules_cut_the_real_network_evenly():
    choose = sharding_for(_mesh(4, 2))
    shapes = parameter_shapes(abstract_flux(FluxConfig(), jnp.bfloat16))
    per_device = sum(np.prod(choose(path, shape).shard_shape(shape)) for path, shape in shapes.items())
    whole = sum(np.prod(shape) for shape in shapes.values())
    assert per_device < 1.01 * whole / 8


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("double_blocks.0.image.qkv.q.kernel", PartitionSpec("fsdp", "tensor")),
        ("double_blocks.0.text.out.kernel", PartitionSpec("tensor", "fsdp")),
        ("single_blocks.0.mlp.kernel", PartitionSpec("fsdp", "tensor")),
        ("single_blocks.0.out.bias", PartitionSpec(None)),
    ],
)
def test_rules_by_name(path, spec):
    shape = (16,) if path.endswith("bias") else (16, 16)
    assert sharding_for(_mesh(4, 2))(path, shape).spec == spec


def test_what_cannot_be_cut_is_logged(caplog):
    assert fit(PartitionSpec("fsdp", "tensor"), "a.kernel", (6, 8), _mesh(4, 2)) == PartitionSpec(None, "tensor")
    assert "does not divide 6" in caplog.text


def test_a_sharded_model_makes_the_same_picture(golden):
    model, lora = str(golden / "pipeline"), str(golden / "lora")
    mesh = _mesh(2, 2)
    alone = load_pipeline(model, lora=lora, dtype="float32", progress=False)
    spread = load_pipeline(model, lora=lora, dtype="float32", mesh=mesh, progress=False)
    kernel = spread.bundle.weights["transformer"][0]["double_blocks"][0]["image"]["qkv"]["q"]["kernel"].get_value()
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    pictures = [np.asarray(p.generate(["a cat"], seeds=[0], settings=SETTINGS)[0], np.int32) for p in (alone, spread)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_lora_lies_on_the_mesh_and_makes_the_same_correction(golden):
    model, lora, mesh = str(golden / "pipeline"), str(golden / "lora"), _mesh(2, 2)
    alone = load_pipeline(model, lora=lora, dtype="float32", progress=False)
    spread = load_pipeline(model, lora=lora, dtype="float32", mesh=mesh, progress=False)
    for leaf in jax.tree.leaves(spread.bundle.weights):
        assert leaf.sharding.device_set == set(mesh.devices.flat)
    bad = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    how = {"seeds": [0], "conditions": [bad], "settings": dataclasses.replace(SETTINGS, latent_lora=False)}
    pictures = [np.asarray(p.generate(["a cat"], **how)[0], np.int32) for p in (alone, spread)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
