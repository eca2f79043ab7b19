"""The autoencoder against its recordings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    attend_in_pieces,
    sample_posterior,
)
from tests.kit.compare import relative_error
from tests.kit.encoders import load_autoencoder, random_model, read_config, to_nchw, to_nhwc

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model(golden):
    return load_autoencoder(golden / "pipeline" / "vae")


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "golden" / "04_vae.npz")


@pytest.fixture(scope="module")
def posterior(model, recorded):
    images = jnp.asarray(recorded["in_images_uint8"], jnp.float32) / 255 * 2 - 1
    return jax.jit(model.encode)(images)


def test_encode(posterior, recorded):
    mean, logvar = posterior
    assert relative_error(to_nchw(mean), recorded["enc_mean"]) < TOLERANCE
    assert relative_error(to_nchw(logvar), recorded["enc_logvar"]) < TOLERANCE
    assert relative_error(to_nchw(jnp.exp(0.5 * logvar)), recorded["enc_std"]) < TOLERANCE


def test_posterior_sample(model, posterior, recorded):
    """Against the recorded tokens, unpacked here: a token is the channels' 2 x 2 patches."""
    mean, logvar = posterior
    z = model.scale(sample_posterior(mean, logvar, jnp.asarray(to_nhwc(recorded["in_noise"]))))
    want = recorded["tokens"].reshape(2, 4, 4, 16, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(2, 8, 8, 16)
    assert relative_error(z, want) < TOLERANCE


def test_decode(model, recorded):
    images = jax.jit(model.decode)(jnp.asarray(to_nhwc(recorded["in_z"])))
    assert relative_error(to_nchw(images), recorded["dec"]) < TOLERANCE


def test_unscale_undoes_scale(model):
    z = jnp.linspace(-3, 3, 16)
    assert relative_error(model.unscale(model.scale(z)), z) < 1e-6


def test_one_wrong_weight_is_noticed(golden, recorded):
    model = load_autoencoder(golden / "pipeline" / "vae")
    scale = model.decoder.up[2].resnets[0].norm1.scale
    scale.set_value(scale[...].at[0].multiply(1.01))
    images = jax.jit(model.decode)(jnp.asarray(to_nhwc(recorded["in_z"])))
    assert relative_error(to_nchw(images), recorded["dec"]) > TOLERANCE


@pytest.fixture(scope="module")
def small():
    config = AutoencoderConfig(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=16
    )
    return random_model(AutoencoderKL, config)


def test_logvar_is_clamped():
    config = AutoencoderConfig(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    model = random_model(AutoencoderKL, config)
    model.encoder.conv_out.bias.set_value(jnp.asarray([0.0, 0.0, -1000.0, 1000.0]))
    mean, logvar = jax.jit(model.encode)(jnp.zeros((1, 4, 4, 3)))
    assert (logvar.min(), logvar.max()) == (-30, 20)
    assert jnp.abs(mean).max() < 20


def test_bfloat16_stays_bfloat16_and_close(small):
    z = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
    decode = jax.jit(small.decode)
    exact, rough = decode(z), decode(z.astype(jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    assert relative_error(rough.astype(jnp.float32), exact) < 0.05


@pytest.mark.parametrize("tiled", [False, True])
def test_tiles_begin_above_sample_size(small, tiled):
    encode, decode = (jax.jit(functools.partial(f, tiled=tiled)) for f in (small.encode, small.decode))
    encode_whole, decode_whole = jax.jit(small.encode), jax.jit(small.decode)
    images = jax.random.normal(jax.random.key(0), (2, 24, 12, 3))
    latents = jax.random.normal(jax.random.key(1), (2, 12, 6, 4))
    assert encode(images)[0].shape == latents.shape
    assert decode(latents).shape == images.shape
    assert (relative_error(encode(images)[0], encode_whole(images)[0]) > 1e-3) == tiled
    assert (relative_error(decode(latents), decode_whole(latents)) > 1e-3) == tiled
    images, latents = images[:, :16], latents[:, :8]
    assert relative_error(encode(images)[0], encode_whole(images)[0]) < TOLERANCE
    assert relative_error(decode(latents), decode_whole(latents)) < TOLERANCE


def test_tiles_on_whole_latents_only():
    config = AutoencoderConfig(block_out_channels=(4, 8), norm_num_groups=2, sample_size=20)
    model = random_model(AutoencoderKL, config)
    with pytest.raises(InputError, match="sample_size 20"):
        model.encode(jnp.zeros((1, 32, 32, 3)), tiled=True)
    with pytest.raises(InputError, match="sample_size 20"):
        model.decode(jnp.zeros((1, 16, 16, 16)), tiled=True)


@pytest.mark.parametrize("at_once", [1, 5, 8])
def test_attention_in_pieces(at_once):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 13, 4))
    weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / 2, axis=-1)
    assert relative_error(attend_in_pieces(q, k, v, at_once), weights @ v) < 1e-6


def test_config_of_the_recordings(golden):
    config = AutoencoderConfig.from_json(read_config(golden / "pipeline" / "vae"))
    assert config == AutoencoderConfig(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=64
    )
    assert config.factor == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"act_fn": "relu"}, "act_fn 'relu'"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types"),
        ({"norm_num_groups": 3}, "norm_num_groups 3"),
        ({"sample_size": [64, 32]}, "sample_size"),
    ],
)
def test_config_refuses(golden, change, message):
    with pytest.raises(InputError, match=message):
        AutoencoderConfig.from_json(read_config(golden / "pipeline" / "vae") | change)
