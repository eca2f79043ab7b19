"""The T5 encoder against Transformers."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from rflow_jax.models.text_encoders import T5Encoder, relative_buckets
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings import text_encoders as names
from tests.kit.compare import relative_error
from tests.kit.encoders import load_t5
from tests.kit.torch_models import on_meta, randomise, shapes_of
from tests.unit.models.test_encoder_sizes import REAL

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5

CONFIGS = {
    "narrow heads": {"vocab_size": 60, "d_model": 24, "d_kv": 4, "d_ff": 40, "num_layers": 3, "num_heads": 5},
    "wide heads, few buckets": {
        "vocab_size": 90,
        "d_model": 16,
        "d_kv": 16,
        "d_ff": 20,
        "num_layers": 2,
        "num_heads": 3,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 30,
        "layer_norm_epsilon": 1e-3,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(Transformers' module, ours read from its folder)."""
    torch.manual_seed(0)
    config = transformers.T5Config(**CONFIGS[request.param], feed_forward_proj="gated-gelu")
    reference = transformers.T5EncoderModel(config)
    randomise(reference, 1)
    folder = tmp_path_factory.mktemp("t5")
    reference.save_pretrained(folder)
    return reference, load_t5(folder)


def both(pair, ids, mask=None):
    reference, model = pair
    theirs = None if mask is None else torch.from_numpy(mask)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids), attention_mask=theirs)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(model)(jnp.asarray(ids, jnp.int32), None if mask is None else jnp.asarray(mask, bool))
    return got, want.last_hidden_state


@pytest.mark.parametrize("length", [1, 20, 300])
def test_without_mask(pair, length):
    ids = np.random.default_rng(length).integers(0, 60, (2, length))
    assert relative_error(*both(pair, ids)) < TOLERANCE


def test_with_mask(pair):
    ids = np.random.default_rng(0).integers(0, 60, (3, 12))
    mask = (np.arange(12) < np.asarray([[12], [7], [1]])).astype(np.int64)
    got, want = both(pair, ids, mask)
    assert relative_error(got, want) < TOLERANCE
    assert relative_error(both(pair, ids)[0], want) > 1e-3


@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (12, 30), (64, 256), (32, 100)])
def test_buckets(buckets, reach):
    distance = np.arange(-2000, 2001)
    want = T5Attention._relative_position_bucket(
        torch.from_numpy(distance), bidirectional=True, num_buckets=buckets, max_distance=reach
    )
    np.testing.assert_array_equal(relative_buckets(distance, buckets, reach), want)


def test_real_size():
    """Parameters and keys of T5 v1.1 XXL's encoder."""
    config, parameters, _ = REAL[T5Encoder]
    theirs = transformers.T5Config(**vars(config), feed_forward_proj="gated-gelu")
    meta = on_meta(transformers.T5EncoderModel, theirs)
    assert sum(p.numel() for p in meta.parameters()) == parameters
    shapes = parameter_shapes(nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0))))
    the_plan = plan(names.t5_mapping(meta.state_dict()), shapes)
    the_plan.check(shapes_of(meta), "meta device")
    assert shapes_of(meta).keys() - the_plan.entries.keys() == {"encoder.embed_tokens.weight"}
