"""Rules of sharding, on eight fake devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rflow_jax import load_pipeline
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.models.layers import abstract
from rflow_jax.models.lora import linear_shapes
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import abstract_qwen2_5_vl
from rflow_jax.models.text_encoders import T5Config, T5Encoder
from rflow_jax.parallel.sharding import fit, sharding_for, whole_parameters
from rflow_jax.weights.loading import parameter_shapes

SETTINGS = SamplingConfig(
    height=32, width=32, num_inference_steps=2, condition_size=32, max_sequence_length=16, latent_lora=True
)
MESHES = {"fsdp": (8, 1), "tensor": (1, 8), "both": (4, 2)}
BOTH = ("fsdp", "tensor")
RANK = 32


def _mesh(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return jax.make_mesh((fsdp, tensor), BOTH, axis_types=(jax.sharding.AxisType.Auto,) * 2)


NETWORKS = {
    "FLUX.1-dev": lambda: abstract_flux(FluxConfig()),
    "Qwen2.5-VL-7B": lambda: abstract_qwen2_5_vl(Qwen25VLConfig()),
    "T5-XXL": lambda: abstract(lambda rngs: T5Encoder(T5Config(), rngs=rngs)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def published(request):
    """A network of its published sizes, without numbers."""
    return NETWORKS[request.param]()


@pytest.mark.parametrize("mesh", MESHES)
def test_rules_cut_the_published_networks(published, mesh):
    shapes = parameter_shapes(published)
    choose = sharding_for(_mesh(*MESHES[mesh]))
    whole = sum(parameter.nbytes for parameter in whole_parameters(choose, shapes))
    total = sum(2 * np.prod(shape) for shape in shapes.values())
    assert whole < 0.001 * total
    assert sum(2 * np.prod(choose(path, shape).shard_shape(shape)) for path, shape in shapes.items()) < 1.01 * total / 8


@pytest.mark.parametrize("mesh", MESHES)
def test_no_lora_matrix_stays_whole(published, mesh):
    linears = linear_shapes(published)
    shapes = {f"{path}.lora_a": (size, RANK) for path, (size, _) in linears.items()}
    shapes |= {f"{path}.lora_b": (RANK, size) for path, (_, size) in linears.items()}
    assert whole_parameters(sharding_for(_mesh(*MESHES[mesh])), shapes) == []


# path, shape -> specs on the meshes of fsdp, of tensor, and of both.
BY_NAME = [
    ("double_blocks.0.image.qkv.q.kernel", (3072, 3072), P("fsdp", None), P(None, "tensor"), P("fsdp", "tensor")),
    ("double_blocks.0.image.qkv.q.lora_a", (3072, 32), P("fsdp", None), P("tensor", None), P("fsdp", None)),
    ("double_blocks.0.image.qkv.q.lora_b", (32, 3072), P(None, "fsdp"), P(None, "tensor"), P(None, "tensor")),
    ("double_blocks.0.text.out.kernel", (3072, 3072), P(None, "fsdp"), P("tensor", None), P("tensor", "fsdp")),
    ("double_blocks.0.image.ff.down.lora_a", (12288, 32), P("fsdp", None), P("tensor", None), P("tensor", None)),
    ("double_blocks.0.image.ff.down.lora_b", (32, 3072), P(None, "fsdp"), P(None, "tensor"), P(None, "fsdp")),
    ("double_blocks.0.image.mod.kernel", (3072, 18432), P("fsdp", None), P(None, "tensor"), P("fsdp", "tensor")),
    ("single_blocks.0.mlp.kernel", (3072, 12288), P("fsdp", None), P(None, "tensor"), P("fsdp", "tensor")),
    ("time_in.linear_1.kernel", (256, 3072), P("fsdp", None), P(None, "tensor"), P("fsdp", "tensor")),
    ("out.kernel", (1536, 1536), P(None, "fsdp"), P("tensor", None), P("tensor", "fsdp")),
    ("final_out.kernel", (3072, 64), P("fsdp", None), P(None, "tensor"), P("fsdp", "tensor")),
    ("reward.kernel", (3584, 1), P("fsdp", None), P("tensor", None), P("fsdp", None)),
    ("vision.blocks.0.ff.up.kernel", (1280, 3420), P("fsdp", None), P("tensor", None), P("fsdp", "tensor")),
    ("vision.blocks.0.ff.up.lora_b", (32, 3420), P("fsdp", None), P("tensor", None), P(None, "tensor")),
    ("vision.blocks.0.ff.down.kernel", (3420, 1280), P(None, "fsdp"), P(None, "tensor"), P("tensor", "fsdp")),
    ("embed.embedding", (32128, 4096), P(None, "fsdp"), P(None, "tensor"), P(None, BOTH)),
    ("vision.class_embedding", (1024,), P("fsdp"), P("tensor"), P(BOTH)),
    ("patches.kernel", (14, 14, 3, 1152), *(P(None, None, None, axes) for axes in ("fsdp", "tensor", BOTH))),
    ("patch_in.kernel", (3, 2, 14, 14, 1280), *(P(None, None, None, None, axes) for axes in ("fsdp", "tensor", BOTH))),
    ("single_blocks.0.out.bias", (3072,), P(None), P(None), P(None)),
    ("decoder.mid.attn.q.kernel", (512, 512), P(None, None), P(None, None), P(None, None)),
]


@pytest.mark.parametrize(("path", "shape", "fsdp", "tensor", "both"), BY_NAME, ids=[case[0] for case in BY_NAME])
def test_rules_by_name(path, shape, fsdp, tensor, both):
    specs = {mesh: sharding_for(_mesh(*sizes))(path, shape).spec for mesh, sizes in MESHES.items()}
    assert specs == {"fsdp": fsdp, "tensor": tensor, "both": both}


@pytest.mark.parametrize(("path", "shape", "spec"), [case[:2] + case[4:] for case in BY_NAME if "_blocks" in case[0]])
def test_layers_of_stacked_blocks_are_not_cut(path, shape, spec):
    stacked = re.sub(r"_blocks\.0\.", "_blocks.block.", path)
    assert sharding_for(_mesh(4, 2))(stacked, (8, *shape)).spec == P(None, *spec)


def test_what_cannot_be_cut_is_logged(caplog):
    assert fit(P("fsdp", "tensor"), "a.kernel", (6, 8), _mesh(4, 2)) == P(None, "tensor")
    assert "axis fsdp of 4 devices does not divide 6" in caplog.text


def test_of_several_axes_those_that_together_divide_are_kept(caplog):
    assert fit(P(None, BOTH), "embed.embedding", (5, 12), _mesh(4, 2)) == P(None, "fsdp")
    assert "axis tensor of 2 devices does not divide 12" in caplog.text
    assert fit(P(None, BOTH), "embed.embedding", (5, 16), _mesh(4, 2)) == P(None, BOTH)


def test_a_parameter_is_logged_once(caplog):
    choose = sharding_for(_mesh(4, 2))
    assert choose("a.kernel", (6, 8)) == choose("a.kernel", (6, 8))
    assert caplog.text.count("does not divide") == 1


def test_whole_parameters_come_largest_first():
    shapes = {"a.bias": (8,), "a.kernel": (8, 8), "norm.scale": (16,), "decoder.conv.kernel": (3, 3, 8, 8)}
    whole = whole_parameters(sharding_for(_mesh(4, 2)), shapes, jnp.float32)
    assert whole == [("decoder.conv.kernel", (3, 3, 8, 8), 2304), ("norm.scale", (16,), 64), ("a.bias", (8,), 32)]


def test_a_model_and_its_lora_lie_on_the_mesh(golden):
    """What they draw there is compared in generation/test_pipeline_mesh.py."""
    mesh = _mesh(2, 2)
    how = {"lora": str(golden / "lora"), "dtype": "float32", "mesh": mesh, "progress": False}
    weights = load_pipeline(str(golden / "pipeline"), **how).bundle.weights
    kernel = weights["transformer"][0]["double_blocks"][0]["image"]["qkv"]["q"]["kernel"].get_value()
    assert kernel.sharding.spec == P("fsdp", "tensor")
    for leaf in jax.tree.leaves(weights):
        assert leaf.sharding.device_set == set(mesh.devices.flat)
