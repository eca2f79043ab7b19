"""CLIP's text model against Transformers."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
import transformers

from rflow_jax.models.text_encoders import ClipTextEncoder
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings import text_encoders as names
from tests.kit.compare import relative_error
from tests.kit.encoders import load_clip
from tests.kit.torch_models import on_meta, randomise, shapes_of
from tests.unit.models.test_encoder_sizes import REAL

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5

CONFIGS = {
    "legacy end token": {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
    },
    "end token amid the vocabulary": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "eos_token_id": 40,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
    },
}
SIZES = {"vocab_size": 60, "intermediate_size": 36, "num_hidden_layers": 3, "max_position_embeddings": 20}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(Transformers' module, ours read from its folder)."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**SIZES, **CONFIGS[request.param], bos_token_id=0, pad_token_id=1)
    reference = transformers.CLIPTextModel(config)
    randomise(reference, 1)
    folder = tmp_path_factory.mktemp("clip")
    reference.save_pretrained(folder)
    return reference, load_clip(folder)


def prompts(length):
    """Random ids; in the first prompt the end token stands twice, in the last nowhere."""
    ids = np.random.default_rng(length).integers(3, 39, (4, length))
    ids[0, [length // 2, -1]] = 40
    ids[1, length // 3] = 40
    ids[2, [length // 4, length // 2]] = [40, 59]
    return ids


@pytest.mark.parametrize("length", [20, 9])
def test_states_and_pooled(pair, length):
    reference, model = pair
    ids = prompts(length)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids))
    with jax.default_matmul_precision("highest"):
        states, pooled = jax.jit(model)(jnp.asarray(ids, jnp.int32))
    assert relative_error(states, want.last_hidden_state) < TOLERANCE
    assert relative_error(pooled, want.pooler_output) < TOLERANCE


def test_real_size():
    """Parameters and keys of the text model of CLIP-L."""
    config, parameters, _ = REAL[ClipTextEncoder]
    meta = on_meta(transformers.CLIPTextModel, transformers.CLIPTextConfig(**vars(config)))
    assert sum(p.numel() for p in meta.parameters()) == parameters
    shapes = parameter_shapes(nnx.eval_shape(lambda: ClipTextEncoder(config, rngs=nnx.Rngs(0))))
    the_plan = plan(names.clip_mapping(meta.state_dict()), shapes)
    assert {key: the_plan.their_shape(key) for key in the_plan.entries} == shapes_of(meta)
