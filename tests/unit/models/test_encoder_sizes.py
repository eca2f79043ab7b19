"""The real networks, built without memory."""

from __future__ import annotations

import math

import pytest
from flax import nnx

from rflow_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from rflow_jax.models.text_encoders import ClipTextConfig, ClipTextEncoder, T5Config, T5Encoder
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings import autoencoder, text_encoders

# Counted on PyTorch's modules; tests/parity counts them again.
REAL = {
    AutoencoderKL: (AutoencoderConfig(), 83_819_683, 244),
    T5Encoder: (T5Config(), 4_762_310_656, 219),
    ClipTextEncoder: (ClipTextConfig(), 123_060_480, 196),
}
TABLES = {
    AutoencoderKL: (autoencoder.DIFFUSERS, autoencoder.bfl(4)),
    T5Encoder: (text_encoders.T5, text_encoders.T5_UNSHARED),
    ClipTextEncoder: (text_encoders.CLIP_TEXT, text_encoders.CLIP_TEXT_5),
}


@pytest.mark.parametrize("network", REAL)
def test_real_sizes(network):
    config, parameters, tensors = REAL[network]
    shapes = parameter_shapes(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0))))
    assert sum(map(math.prod, shapes.values())) == parameters
    for table in TABLES[network]:
        assert len(plan(table, shapes).entries) == tensors


def test_names_of_ae_safetensors():
    """The decoder's levels count from the image inwards, and the attention is made of 1 x 1 convolutions."""
    shapes = parameter_shapes(nnx.eval_shape(lambda: AutoencoderKL(AutoencoderConfig(), rngs=nnx.Rngs(0))))
    the_plan = plan(autoencoder.bfl(4), shapes)
    wanted = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.mid.attn_1.norm.bias": (512,),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.mid.block_2.conv1.weight": (512, 512, 3, 3),
        "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.0.conv1.weight": (128, 256, 3, 3),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.bias": (3,),
    }
    assert {key: the_plan.their_shape(key) for key in wanted} == wanted
    assert "decoder.up.0.upsample.conv.weight" not in the_plan.entries
    assert "encoder.down.3.downsample.conv.weight" not in the_plan.entries
