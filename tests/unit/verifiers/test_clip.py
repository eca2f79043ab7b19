"""CLIP as a verifier, by this package's own network; parity with Transformers is tested in tests/parity."""

from __future__ import annotations

import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rflow_jax.errors import InputError
from rflow_jax.models.clip import ClipConfig, ClipVisionConfig
from rflow_jax.models.text_encoders import ClipTextConfig
from rflow_jax.verifiers import clip
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.clip import ClipImages, CLIPVerifier
from rflow_jax.verifiers.config import ClipVerifierConfig
from rflow_jax.weights.components import load_clip_model
from tests.kit.clip import VISION, make_clip

DRAW = np.random.default_rng(0)
IMAGES = [Image.fromarray(DRAW.integers(0, 256, (*size, 3), np.uint8)) for size in ((20, 20), (50, 31), (22, 90))]
ITEMS = [{"prompt": prompt} for prompt in ("a cat", "two dogs", "a red cube")]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "model", golden)


def own(folder, **how):
    return CLIPVerifier(ClipVerifierConfig(str(folder), "own", **{"batch_size": 2} | how))


@pytest.fixture(scope="module")
def verifier(folder):
    return own(folder)


@pytest.fixture(scope="module")
def verdicts(verifier):
    return verifier.score(IMAGES, ITEMS)


def test_protocol(verifier, verdicts):
    assert isinstance(verifier, Verifier)
    assert (verifier.name, verifier.concurrency, verifier.batch_size) == ("clip", 1, 2)
    assert all(-100 <= verdict.score <= 100 and verdict.label is None for verdict in verdicts)
    assert len({round(verdict.score, 2) for verdict in verdicts}) == 3


def test_scores_do_not_depend_on_the_batch(folder, verifier, verdicts):
    alone = [verifier.score([image], [item])[0] for image, item in zip(IMAGES, ITEMS, strict=True)]
    assert alone == verdicts
    others = own(folder, batch_size=3).score(IMAGES[::-1], ITEMS[::-1])
    assert [v.score for v in others[::-1]] == pytest.approx([v.score for v in verdicts], rel=1e-5)


def test_the_scale_stays_float32(folder):
    assert load_clip_model(folder, jnp.bfloat16).logit_scale[...] == np.float32(np.log(100))


def test_bfloat16_is_near(folder, verdicts):
    half = own(folder, dtype="bfloat16").score(IMAGES, ITEMS)
    assert [v.score for v in half] == pytest.approx([v.score for v in verdicts], abs=3)
    assert half != verdicts


def test_what_cannot_be_scored_is_an_error_of_its_own(verifier, verdicts):
    file = io.BytesIO()
    IMAGES[1].save(file, "JPEG")
    broken = Image.open(io.BytesIO(file.getvalue()[:-200]))
    found = verifier.score(
        [broken, IMAGES[0], IMAGES[1], IMAGES[2]], [ITEMS[0], {"prompt": "long " * 99}, ITEMS[1], {}]
    )
    assert [verdict.scored for verdict in found] == [False, False, True, False]
    assert found[2] == verdicts[1]
    assert "cannot be decoded" in found[0].error
    assert "the model reads 77" in found[1].error
    assert "no prompt" in found[3].error


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def test_a_score_that_is_no_number(copied):
    file = copied / "model.safetensors"
    tensors = load_file(file)
    tensors["visual_projection.weight"] = np.full_like(tensors["visual_projection.weight"], 3e38)  # overflows
    save_file(tensors, file)
    found = own(copied).score(IMAGES, ITEMS)
    assert ["not a number" in verdict.error for verdict in found] == [True] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("logit_scale"), "logit_scale missing"),
        (lambda x: x.pop("text_projection.weight"), r"text_projection\.weight missing"),
        (lambda x: x.update({"vision_model.head.bias": np.ones(2)}), r"vision_model\.head\.bias not known"),
        (lambda x: x.update({"text_projection.weight": np.ones((8, 13))}), r"has shape \[8, 13\]"),
    ],
)
@pytest.mark.parametrize("implementation", ["own", "auto"])
def test_keys_and_shapes_are_exact(copied, change, message, implementation, monkeypatch):
    monkeypatch.setattr(
        clip, "_flax_class", lambda: "a class that must not be asked" if implementation == "auto" else None
    )
    file = copied / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=message):
        CLIPVerifier(ClipVerifierConfig(str(copied), implementation))


def test_without_flax_in_transformers(folder, monkeypatch, verdicts):
    monkeypatch.setattr(clip, "_flax_class", lambda: None)
    found = CLIPVerifier(ClipVerifierConfig(str(folder), "auto", batch_size=2)).score(IMAGES, ITEMS)
    assert found == verdicts
    with pytest.raises(InputError, match="no FlaxCLIPModel"):
        CLIPVerifier(ClipVerifierConfig(str(folder), "transformers"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "siglip"}, "model_type 'siglip'"),
        ("config.json", {"vision_config": VISION | {"hidden_act": "relu"}}, "hidden_act 'relu'"),
        ("config.json", {"vision_config": VISION | {"hidden_size": "wide"}}, "hidden_size is 'wide'"),
        ("config.json", {"vision_config": [1]}, r"vision_config is \[1\]; expected an object"),
        ("config.json", {"projection_dim": None}, "projection_dim is None; expected a whole number above 0"),
        ("preprocessor_config.json", {"crop_size": 224}, "crop_size is 224"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 8}}, "does not give images of 20"),
        ("preprocessor_config.json", {"size": {"longest_edge": 20}}, "longest_edge"),
        ("preprocessor_config.json", {"do_resize": False}, "does not give images of 20"),
        ("preprocessor_config.json", {"image_std": None}, "image_std"),
    ],
)
def test_a_checkpoint_of_another_architecture(copied, file, change, message):
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as caught:
        own(copied)
    assert str(path) in str(caught.value)


def test_early_configurations_have_their_sizes_twice():
    text = {"hidden_size": 24, "num_attention_heads": 4}
    content = {"model_type": "clip", "text_config": {"vocab_size": 9}, "text_config_dict": text}
    config = ClipConfig.from_json(content | {"vision_config": None})
    assert (config.text.hidden_size, config.text.vocab_size, config.projection_dim) == (24, 9, 512)
    assert config.vision == ClipVisionConfig()
    assert config.text.num_hidden_layers == ClipTextConfig().num_hidden_layers


def test_the_middle_is_cut_out():
    images = ClipImages(resized=4, side=3)
    ramp = np.arange(10, dtype=np.uint8)[None, :, None] * np.ones((4, 1, 3), np.uint8)
    np.testing.assert_array_equal(images.cut(Image.fromarray(ramp))[..., 0], np.tile([3, 4, 5], (3, 1)))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"dtype": "float16"}])
def test_bad_settings(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        ClipVerifierConfig(**wrong)
