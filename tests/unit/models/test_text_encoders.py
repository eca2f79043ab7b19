"""T5 and CLIP against their recordings."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rflow_jax.errors import InputError
from rflow_jax.models.text_encoders import (
    ClipTextConfig,
    ClipTextEncoder,
    T5Config,
    T5Encoder,
    end_positions,
    relative_buckets,
)
from tests.kit.compare import relative_error
from tests.kit.encoders import load_clip, load_t5, random_model, read_config

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "golden" / "05_text.npz")


@pytest.fixture(scope="module")
def t5(golden):
    return load_t5(golden / "pipeline" / "text_encoder_2")


@pytest.fixture(scope="module")
def clip(golden):
    return load_clip(golden / "pipeline" / "text_encoder")


def ids_of(recorded, key):
    return jnp.asarray(recorded[key], jnp.int32)


def test_t5(t5, recorded):
    states = jax.jit(t5)(ids_of(recorded, "t5_input_ids"))
    assert relative_error(states, recorded["t5_embeds"]) < TOLERANCE


def test_t5_at_the_training_length(t5, recorded):
    states = jax.jit(t5)(ids_of(recorded, "t5_input_ids_512"))
    assert relative_error(states[:, :96], recorded["t5_embeds_512_first96"]) < TOLERANCE


def test_t5_mask_hides_the_padding(t5, recorded):
    ids = ids_of(recorded, "t5_input_ids")[:1]
    length = int(recorded["t5_untruncated_len"][0])
    masked = t5(ids, jnp.arange(ids.shape[1])[None] < length)
    assert relative_error(masked[:, :length], t5(ids[:, :length])) < TOLERANCE
    assert relative_error(masked[:, :length], t5(ids)[:, :length]) > 1e-3


def test_clip(clip, recorded):
    states, pooled = jax.jit(clip)(ids_of(recorded, "clip_input_ids"))
    assert relative_error(states, recorded["clip_last_hidden_state"]) < TOLERANCE
    assert relative_error(pooled, recorded["clip_pooled"]) < TOLERANCE


def test_one_wrong_weight_is_noticed(golden, recorded):
    t5, clip = (
        load_t5(golden / "pipeline" / "text_encoder_2"),
        load_clip(golden / "pipeline" / "text_encoder"),
    )
    for kernel in (t5.blocks[0].attn.q.kernel, clip.blocks[0].attn.q.kernel):
        kernel.set_value(kernel[...].at[0].multiply(1.05))
    assert relative_error(t5(ids_of(recorded, "t5_input_ids")), recorded["t5_embeds"]) > TOLERANCE
    assert relative_error(clip(ids_of(recorded, "clip_input_ids"))[1], recorded["clip_pooled"]) > TOLERANCE


def copy_config(golden, name, tmp_path):
    """Begins a copy of a recorded text encoder; returns its tensors."""
    source = golden / "pipeline" / name
    shutil.copy(source / "config.json", tmp_path)
    return load_file(source / "model.safetensors")


def test_clip_without_prefix(golden, clip, recorded, tmp_path):
    """The names of Transformers 5."""
    tensors = copy_config(golden, "text_encoder", tmp_path)
    tensors = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    ids = ids_of(recorded, "clip_input_ids")
    np.testing.assert_array_equal(load_clip(tmp_path)(ids)[1], clip(ids)[1])


def test_clip_with_constants_of_old_files(golden, clip, recorded, tmp_path):
    tensors = copy_config(golden, "text_encoder", tmp_path)
    positions = np.arange(77)[None]
    save_file(tensors | {"text_model.embeddings.position_ids": positions}, tmp_path / "model.safetensors")
    ids = ids_of(recorded, "clip_input_ids")
    np.testing.assert_array_equal(load_clip(tmp_path)(ids)[1], clip(ids)[1])


@pytest.mark.parametrize("keep_shared", [True, False])
def test_t5_embedding_under_its_other_name(golden, t5, recorded, tmp_path, keep_shared):
    tensors = copy_config(golden, "text_encoder_2", tmp_path)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    if not keep_shared:
        del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    ids = ids_of(recorded, "t5_input_ids")
    np.testing.assert_array_equal(load_t5(tmp_path)(ids), t5(ids))


def test_missing_tensor_is_named(golden, tmp_path):
    tensors = copy_config(golden, "text_encoder_2", tmp_path)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"encoder\.final_layer_norm\.weight missing"):
        load_t5(tmp_path)


def test_legacy_end_token_is_the_highest_id():
    ids = jnp.asarray([[5, 9, 7, 9], [9, 2, 2, 2]])
    np.testing.assert_array_equal(end_positions(ids, 2), [1, 0])


def test_end_token_is_the_first_of_its_id():
    ids = jnp.asarray([[5, 99, 7, 7], [9, 2, 3, 7], [1, 2, 3, 4]])
    np.testing.assert_array_equal(end_positions(ids, 7), [2, 3, 0])


def test_buckets_by_hand():
    """32 buckets up to 128: single distances below 8, then 8 to 15 by powers of 2 ** 0.5."""
    behind = relative_buckets(-np.asarray([0, 1, 7, 8, 11, 12, 16, 32, 64, 127, 128, 500]), 32, 128)
    np.testing.assert_array_equal(behind, [0, 1, 7, 8, 8, 9, 10, 12, 14, 15, 15, 15])
    ahead = relative_buckets(np.asarray([1, 7, 8, 500]), 32, 128)
    np.testing.assert_array_equal(ahead, [17, 23, 24, 31])


def test_bfloat16_parameters_compute_in_bfloat16():
    t5 = random_model(T5Encoder, T5Config(30, 16, 4, 32, 1, 4), dtype=jnp.bfloat16)
    clip = random_model(
        ClipTextEncoder, ClipTextConfig(16, 32, 1, 4, vocab_size=30, max_position_embeddings=8), dtype=jnp.bfloat16
    )
    ids = jnp.arange(8)[None]
    assert jax.jit(t5)(ids).dtype == jnp.bfloat16
    assert {array.dtype for array in jax.jit(clip)(ids)} == {jnp.dtype(jnp.bfloat16)}


def test_clip_has_only_its_positions(clip):
    with pytest.raises(InputError, match="78 CLIP tokens"):
        clip(jnp.zeros((1, 78), jnp.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "umt5"}, "umt5"), ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'")],
)
def test_t5_config_refuses(golden, change, message):
    with pytest.raises(InputError, match=message):
        T5Config.from_json(read_config(golden / "pipeline" / "text_encoder_2") | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "model_type 'clip'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
    ],
)
def test_clip_config_refuses(golden, change, message):
    with pytest.raises(InputError, match=message):
        ClipTextConfig.from_json(read_config(golden / "pipeline" / "text_encoder") | change)
