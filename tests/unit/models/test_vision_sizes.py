"""The real vision networks and the verifiers made of them, built without memory."""

from __future__ import annotations

import math

import pytest

from rflow_jax.models.clip import Clip, ClipConfig, ClipVisionConfig
from rflow_jax.models.layers import abstract
from rflow_jax.models.nvila import Nvila, NvilaConfig, abstract_nvila
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.siglip import SiglipVisionConfig, SiglipVisionTower
from rflow_jax.models.text_encoders import ClipTextConfig
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings import nvila, qwen, text_encoders

NVILA_LITE = NvilaConfig(
    SiglipVisionConfig(),
    Qwen2Config(
        vocab_size=151_651,
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
)
CLIP_L = ClipConfig(
    ClipTextConfig(),
    ClipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    ),
    768,
)
# (sizes, parameters, tensors), counted on PyTorch's modules; tests/parity counts them again.
REAL = {
    SiglipVisionTower: (SiglipVisionConfig(), 413_327_088, 437),
    Nvila: (NVILA_LITE, 413_327_088 + 43_533_696 + 1_543_276_544, 437 + 10 + 338),
    Clip: (CLIP_L, 427_616_513 - 1, 590 - 1),  # its scale is no parameter of ours
}
TABLES = {SiglipVisionTower: (nvila.SIGLIP, nvila.SIGLIP_5), Clip: (text_encoders.CLIP_WHOLE,)}


@pytest.mark.parametrize("network", REAL)
def test_real_sizes(network):
    config, parameters, tensors = REAL[network]
    shapes = parameter_shapes(abstract(lambda rngs: network(config, rngs=rngs)))
    assert sum(map(math.prod, shapes.values())) == parameters
    assert len(shapes) == tensors
    for table in TABLES.get(network, ()):
        assert len(plan(table, shapes).entries) == tensors


def test_names_of_the_parts_of_nvila():
    network = abstract_nvila(NVILA_LITE)
    parts = {
        network.tower: (nvila.SIGLIP, "vision_model.encoder.layers.26.mlp.fc1.weight", (4304, 1152)),
        network.projector: (nvila.PROJECTOR, "layers.2.weight", (3456, 10_368)),
        network.language: (qwen.qwen2_mapping(head=False), "model.layers.27.mlp.up_proj.weight", (8960, 1536)),
    }
    for part, (table, key, shape) in parts.items():
        assert plan(table, parameter_shapes(part)).their_shape(key) == shape


def test_a_picture_of_nvila_is_121_tokens():
    assert NVILA_LITE.picture_tokens == 121
    assert NVILA_LITE.tiling.most == 13
    assert NVILA_LITE.tiling.grid(1024, 1024) == (3, 3)
    assert NVILA_LITE.tiling.grid(512, 512) == (1, 1)
