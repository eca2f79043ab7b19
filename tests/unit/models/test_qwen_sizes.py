"""The published sizes of Qwen2.5-VL, built without memory."""

from __future__ import annotations

import dataclasses
import math

import pytest

from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import abstract_qwen2_5_vl, abstract_reward_model
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings.qwen import qwen2_5_vl_mapping, reward_mapping

_7B = Qwen25VLConfig()
_3B = Qwen25VLConfig(
    dataclasses.replace(
        _7B.language,
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    dataclasses.replace(_7B.vision, out_hidden_size=2048),
)
# Parameters and tensors; counted on PyTorch's modules, and counted again by tests/parity.
REAL = {"7B": (_7B, 8_292_166_656, 729), "3B": (_3B, 3_754_622_976, 824)}


@pytest.mark.parametrize("name", REAL)
def test_real_sizes(name):
    config, parameters, tensors = REAL[name]
    model = abstract_qwen2_5_vl(config)
    shapes = parameter_shapes(model)
    assert sum(map(math.prod, shapes.values())) == parameters
    assert len(plan(qwen2_5_vl_mapping((), head=model.language.head is not None), shapes).entries) == tensors


def test_reward_models_have_no_language_head():
    shapes = parameter_shapes(abstract_reward_model(_7B, 1))
    head = math.prod((_7B.language.vocab_size, _7B.language.hidden_size))
    assert sum(map(math.prod, shapes.values())) == REAL["7B"][1] - head + _7B.language.hidden_size
    assert plan(reward_mapping(), shapes).entries["rm_head.weight"]
