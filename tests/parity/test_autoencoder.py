"""The autoencoder against diffusers, whole and in tiles."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file

from rflow_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings import autoencoder as names
from tests.kit.compare import relative_error
from tests.kit.encoders import load_autoencoder, to_nchw, to_nhwc
from tests.kit.torch_models import on_meta, randomise, shapes_of
from tests.unit.models.test_encoder_sizes import REAL

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5

CONFIGS = {
    "quant convolutions": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    },
    "no attention": {
        "block_out_channels": (8, 8, 24),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "latent_channels": 6,
        "sample_size": 32,
        "shift_factor": 0.3,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
    },
    "as FLUX": {
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 16,
        "sample_size": 64,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
# (latent height, width) of images cut into tiles of 8 every 6: several lines, one line, a last tile of one latent.
TILED = {"quant convolutions": (13, 13), "no attention": (18, 10), "as FLUX": (6, 13)}


def theirs(config):
    levels = len(config["block_out_channels"])
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    return {"down_block_types": down, "up_block_types": up, **config}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(diffusers' module, ours read from its folder, latent size of a tiled image)."""
    torch.manual_seed(0)
    reference = diffusers.AutoencoderKL(**theirs(CONFIGS[request.param]))
    randomise(reference, 1)
    folder = tmp_path_factory.mktemp("vae")
    reference.save_pretrained(folder)
    return reference, load_autoencoder(folder), TILED[request.param]


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@torch.no_grad()
def check(reference, model, latent_size, tiled):
    factor, z = model.config.factor, model.config.latent_channels
    height, width = latent_size
    images, latents = random(0, 2, 3, height * factor, width * factor), random(1, 2, z, height, width)
    posterior = reference.encode(torch.from_numpy(images)).latent_dist
    decoded = reference.decode(torch.from_numpy(latents)).sample
    with jax.default_matmul_precision("highest"):
        mean, logvar = jax.jit(lambda x: model.encode(x, tiled=tiled))(jnp.asarray(to_nhwc(images)))
        ours = jax.jit(lambda x: model.decode(x, tiled=tiled))(jnp.asarray(to_nhwc(latents)))
    assert relative_error(to_nchw(mean), posterior.mean) < TOLERANCE
    assert relative_error(to_nchw(logvar), posterior.logvar) < TOLERANCE
    assert relative_error(to_nchw(ours), decoded) < TOLERANCE


@pytest.mark.parametrize("latent_size", [(8, 8), (5, 9)])
def test_whole(pair, latent_size):
    reference, model, _ = pair
    reference.disable_tiling()
    check(reference, model, latent_size, tiled=False)


def test_tiled(pair):
    reference, model, latent_size = pair
    reference.enable_tiling()
    check(reference, model, latent_size, tiled=True)


def test_tiling_off_is_another_result(pair):
    """Or the tests of the tiles would prove nothing."""
    reference, model, latent_size = pair
    latents = random(1, 1, model.config.latent_channels, *latent_size)
    reference.enable_tiling()
    with torch.no_grad():
        tiled = reference.decode(torch.from_numpy(latents)).sample
    whole = jax.jit(model.decode)(jnp.asarray(to_nhwc(latents)))
    assert relative_error(to_nchw(whole), tiled) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_black_forest_labs_names(name, tmp_path):
    """diffusers' own reader of such files must find every tensor that our table names, and mean the same."""
    config = theirs(CONFIGS[name])
    reference = diffusers.AutoencoderKL(**config)
    (tmp_path / "config.json").write_text(json.dumps(dict(reference.config)))
    ours = AutoencoderConfig.from_json(dict(reference.config))
    shapes = parameter_shapes(nnx.eval_shape(lambda: AutoencoderKL(ours, rngs=nnx.Rngs(0))))
    the_plan = plan(names.bfl(len(ours.block_out_channels)), shapes)
    tensors = {}
    for seed, key in enumerate(the_plan.entries):
        shape = the_plan.their_shape(key)
        value = random(seed, *shape) * np.prod(shape[1:]) ** -0.5
        tensors[key] = torch.from_numpy(value + 0.5 if len(shape) == 1 else 2 * value)
    save_file(tensors, tmp_path / "ae.safetensors")
    converted = convert_ldm_vae_checkpoint(dict(tensors), config)
    assert len(converted) == len(tensors)
    reference.load_state_dict(converted, strict=True)
    check(reference.eval(), load_autoencoder(tmp_path), (4, 6), tiled=False)


def test_real_size():
    """Parameters and keys of FLUX.1's autoencoder."""
    config, parameters, _ = REAL[AutoencoderKL]
    sizes = {"block_out_channels": config.block_out_channels, "layers_per_block": config.layers_per_block}
    flags = {"use_quant_conv": False, "use_post_quant_conv": False}
    meta = on_meta(diffusers.AutoencoderKL, **theirs(sizes), latent_channels=config.latent_channels, **flags)
    assert sum(p.numel() for p in meta.parameters()) == parameters
    shapes = parameter_shapes(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0))))
    the_plan = plan(names.DIFFUSERS, shapes)
    assert {key: the_plan.their_shape(key) for key in the_plan.entries} == shapes_of(meta)
