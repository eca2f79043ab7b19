"""SigLIP's vision tower against Transformers."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
import transformers

from rflow_jax.models.layers import abstract
from rflow_jax.models.siglip import SiglipVisionConfig, SiglipVisionTower
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import load_into, parameter_shapes
from rflow_jax.weights.mappings import nvila as names
from rflow_jax.weights.safetensors_io import TensorFiles
from tests.kit.compare import relative_error
from tests.kit.encoders import read_config
from tests.kit.torch_models import on_meta, randomise, shapes_of
from tests.unit.models.test_vision_sizes import REAL

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5

CONFIGS = {
    "a grid that fits": {"image_size": 24, "patch_size": 4, "vision_use_head": False},
    "pixels left over, a head": {"image_size": 26, "patch_size": 5, "vision_use_head": True, "layer_norm_eps": 1e-3},
}
SIZES = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(Transformers' module, ours read from its folder)."""
    torch.manual_seed(0)
    reference = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **CONFIGS[request.param]))
    randomise(reference, 1)
    folder = tmp_path_factory.mktemp("siglip")
    reference.save_pretrained(folder)
    config, files = SiglipVisionConfig.from_json(read_config(folder)), TensorFiles.open(folder)
    model = abstract(lambda rngs: SiglipVisionTower(config, rngs=rngs))
    return reference, load_into(model, names.siglip_mapping(files), files)


def test_every_state(pair):
    reference, model = pair
    side = model.config.image_size
    pixels = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        want = reference(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
    layers = (-4, -3, -2, -1, 0, 2)

    @jax.jit
    def run(x):
        return model.states(x), model(x), [model.features(x, layer) for layer in layers]

    with jax.default_matmul_precision("highest"):
        states, last, features = run(jnp.asarray(pixels))
    for layer, one in zip(layers, features, strict=True):
        assert relative_error(one, want.hidden_states[layer]) < TOLERANCE
    assert [relative_error(*both) < TOLERANCE for both in zip(states, want.hidden_states, strict=True)] == [True] * 4
    assert relative_error(last, want.last_hidden_state) < TOLERANCE


def test_real_size():
    """Parameters and keys of so400m."""
    config, parameters, _ = REAL[SiglipVisionTower]
    reference = transformers.SiglipVisionConfig(**vars(config), vision_use_head=False)
    meta = on_meta(transformers.SiglipVisionModel, reference)
    assert sum(p.numel() for p in meta.parameters()) == parameters
    shapes = parameter_shapes(abstract(lambda rngs: SiglipVisionTower(config, rngs=rngs)))
    the_plan = plan(names.siglip_mapping(meta.state_dict()), shapes)
    assert {key: the_plan.their_shape(key) for key in the_plan.entries} == shapes_of(meta)
