"""CLIP as a whole against Transformers, PyTorch's and Flax's, and its images against CLIPImageProcessor."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
import transformers

from rflow_jax.models.clip import Clip
from rflow_jax.models.layers import abstract
from rflow_jax.verifiers.clip import ClipImages, CLIPVerifier, _flax_class
from rflow_jax.verifiers.config import ClipVerifierConfig
from rflow_jax.weights.components import load_clip_model
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings.text_encoders import CLIP_WHOLE, LOGIT_SCALE
from tests.kit.compare import relative_error
from tests.kit.torch_models import on_meta, randomise, shapes_of
from tests.unit.models.test_vision_sizes import REAL

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
SIDE, TOKENS = 30, 77
needs_flax = pytest.mark.skipif(int(transformers.__version__.partition(".")[0]) >= 5, reason="no Flax in it")


@pytest.fixture(scope="module")
def vocabulary(golden):
    return transformers.AutoTokenizer.from_pretrained(golden / "pipeline" / "tokenizer")


@pytest.fixture(scope="module")
def pair(golden, vocabulary, tmp_path_factory):
    """(PyTorch's model, the folder that it was saved in)."""
    torch.manual_seed(0)
    ends = {"eos_token_id": vocabulary.eos_token_id, "bos_token_id": vocabulary.bos_token_id}
    text = {"vocab_size": len(vocabulary), "hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3}
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 7}
    config = transformers.CLIPConfig(
        text_config=text | ends | {"num_hidden_layers": 2, "max_position_embeddings": TOKENS},
        vision_config=vision | {"num_hidden_layers": 3, "hidden_act": "gelu"},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    randomise(model, 1)
    folder = tmp_path_factory.mktemp("clip") / "model"
    model.save_pretrained(folder)
    shutil.copytree(golden / "pipeline" / "tokenizer", folder, dirs_exist_ok=True)
    processor().save_pretrained(folder)
    return model, folder


def processor(**how):
    how = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}} | how
    return transformers.CLIPImageProcessor(**how)


def pictures():
    draw = np.random.default_rng(0)
    sizes = [(30, 30), (31, 47), (200, 64), (17, 23), (90, 31)]
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


def reference_scores(pair, vocabulary, images, prompts):
    ids = vocabulary(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt")["input_ids"]
    pixels = processor()(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return pair[0](input_ids=ids, pixel_values=pixels).logits_per_image.diag().numpy()


PROMPTS = ["a red cube", "two dogs", "a photo of a bench left of a cup", "", "x"]


def test_the_network(pair):
    model, folder = pair
    draw = np.random.default_rng(1)
    pixels = draw.standard_normal((3, SIDE, SIDE, 3)).astype(np.float32)
    ids = draw.integers(3, 200, (3, 11))
    ids[:, -3] = model.config.text_config.eos_token_id
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with jax.default_matmul_precision("highest"):
        own = load_clip_model(folder, jnp.float32)
        scores = jax.jit(own)(jnp.asarray(pixels), jnp.asarray(ids, jnp.int32))
        vectors = jax.jit(lambda x: own.vision_out(own.vision(x)))(jnp.asarray(pixels))
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    assert relative_error(unit, out.image_embeds) < TOLERANCE
    assert relative_error(scores, out.logits_per_image.diag()) < TOLERANCE


@pytest.mark.parametrize("implementation", ["own", pytest.param("transformers", marks=needs_flax)])
def test_the_verifier(pair, vocabulary, implementation):
    want = reference_scores(pair, vocabulary, pictures(), PROMPTS)
    with jax.default_matmul_precision("highest"):
        verifier = CLIPVerifier(ClipVerifierConfig(str(pair[1]), implementation, batch_size=3))
        verdicts = verifier.score(pictures(), [{"prompt": prompt} for prompt in PROMPTS])
    assert relative_error([verdict.score for verdict in verdicts], want) < TOLERANCE
    assert np.ptp(want) > 1


@needs_flax
def test_auto_takes_transformers(pair, vocabulary):
    assert _flax_class() is transformers.FlaxCLIPModel


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"size": {"shortest_edge": 41}},
        {"size": SIDE, "crop_size": SIDE},
        {"size": {"height": 33, "width": 50}, "resample": 2},
        {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False, "resample": 1},
    ],
)
def test_images_are_cut_as_by_the_processor(how):
    theirs = processor(**how, do_rescale=False, do_normalize=False)
    images = ClipImages.from_json(theirs.to_dict(), SIDE, "here")
    for picture in pictures():
        want = theirs(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(images.cut(picture), want)


def test_real_size():
    """Parameters and keys of CLIP ViT-L/14."""
    config, parameters, _ = REAL[Clip]
    sizes = {"text_config": vars(config.text), "vision_config": vars(config.vision)}
    meta = on_meta(transformers.CLIPModel, transformers.CLIPConfig(**sizes, projection_dim=config.projection_dim))
    assert sum(p.numel() for p in meta.parameters()) == parameters + 1
    the_plan = plan(CLIP_WHOLE, parameter_shapes(abstract(lambda rngs: Clip(config, rngs=rngs))))
    found = {key: the_plan.their_shape(key) for key in the_plan.entries}
    assert found | {LOGIT_SCALE: ()} == shapes_of(meta)
