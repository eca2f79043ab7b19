"""Loads the networks around the transformer the way the converter does."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rflow_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from rflow_jax.models.text_encoders import ClipTextConfig, ClipTextEncoder, T5Config, T5Encoder
from rflow_jax.weights.loading import load_into
from rflow_jax.weights.mappings import autoencoder, text_encoders
from rflow_jax.weights.safetensors_io import TensorFiles


def load_autoencoder(folder: Path) -> AutoencoderKL:
    config = AutoencoderConfig.from_json(read_config(folder))
    files = TensorFiles.open(folder)
    model = nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))
    return load_into(model, autoencoder.autoencoder_mapping(files, len(config.block_out_channels)), files)


def load_t5(folder: Path) -> T5Encoder:
    config = T5Config.from_json(read_config(folder))
    files = TensorFiles.open(folder)
    return load_into(
        nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))), text_encoders.t5_mapping(files), files
    )


def load_clip(folder: Path) -> ClipTextEncoder:
    config = ClipTextConfig.from_json(read_config(folder))
    files = TensorFiles.open(folder)
    model = nnx.eval_shape(lambda: ClipTextEncoder(config, rngs=nnx.Rngs(0)))
    return load_into(model, text_encoders.clip_mapping(files), files)


def random_model(network, config, *, seed: int = 0, dtype=jnp.float32):
    """A network of random weights, none of them idle; faster than to initialise layer by layer."""
    model = nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        width = np.prod(variable.shape[:-1])
        value = draw.standard_normal(variable.shape) * (width**-0.5 if variable.ndim > 1 else 0.2)
        variable.set_value(jnp.asarray(value + (path[-1] == "scale"), dtype))
    return model


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def to_nhwc(images) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(images).transpose(0, 2, 3, 1))


def to_nchw(images) -> np.ndarray:
    return np.asarray(images).transpose(0, 3, 1, 2)
