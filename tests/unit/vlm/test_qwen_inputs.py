"""What Qwen2.5-VL is given: sizes, layouts of windows, positions, tokens; and what is refused."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig, VisionConfig
from rflow_jax.models.qwen2_5_vl.layout import layout_of, patch_positions, rope_positions, window_count
from rflow_jax.tokenizers.qwen import IMAGE, QwenTokenizer, expand_images, question
from rflow_jax.utils.images import levels_in
from rflow_jax.vlm.qwen_batching import QwenSample, Sizes, batch_of, bucket
from rflow_jax.vlm.qwen_processing import (
    ImageProcessorConfig,
    QwenProcessor,
    fit_size,
    fitted,
    limited,
    normalised,
    patches_of,
    read_image_processor_config,
)
from rflow_jax.weights.qwen import read_qwen_config

VISION = VisionConfig()


@given(st.integers(1, 100_000))
def test_buckets_are_close_and_few(size):
    padded = bucket(size)
    assert size <= padded <= size + size / 16 + 1
    assert bucket(padded) == padded


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_every_patch_has_its_slot(rows, columns, more):
    """Windows hold each patch once, patches near each other, and the way back is the way there."""
    grid = (1, 2 * rows, 2 * columns)
    count, windows = 4 * rows * columns, window_count(grid, VISION)
    layout = layout_of([grid], VISION, patches=count + 4 * more, windows=windows + more)
    used = np.arange(layout.windows.shape[2]) < layout.window_lengths[0, :windows, None]
    assert sorted(layout.windows[0, :windows][used]) == list(range(count))
    np.testing.assert_array_equal(layout.windows[0].ravel()[layout.slots[0, :count]], np.arange(count))
    for window, own in zip(layout.windows[0, :windows], used, strict=True):
        places = layout.positions[0][window[own]]
        assert np.all(places // 8 == places[0] // 8)


def test_patches_of_a_unit_are_neighbours():
    positions = patch_positions((1, 4, 6), VISION)
    np.testing.assert_array_equal(positions[:4], [[0, 0], [0, 1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(positions[12:14], [[2, 0], [2, 1]])


def test_patches_are_the_pixels():
    rules = ImageProcessorConfig(patch_size=2, merge_size=2)
    pixels = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 3)
    patches, grid = patches_of(pixels, rules)
    assert grid == (1, 2, 4)
    for patch, (row, column) in zip(patches, patch_positions(grid, VISION), strict=True):
        own = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(patch.reshape(3, 2, 2), own.transpose(2, 0, 1))


def test_positions_of_a_picture():
    """Text counts on; the picture's rows and columns count from there; the text goes on from the largest."""
    config = Qwen25VLConfig(image_token_id=9)
    ids = np.asarray([[1, 2, 9, 9, 9, 9, 9, 9, 3, 0]])
    positions, following = rope_positions(ids, np.asarray([9]), [[(1, 4, 6)]], config)
    np.testing.assert_array_equal(positions[0, 0], [0, 1, 2, 2, 2, 2, 2, 2, 5, 1])
    np.testing.assert_array_equal(positions[1, 0], [0, 1, 2, 2, 2, 3, 3, 3, 5, 1])
    np.testing.assert_array_equal(positions[2, 0], [0, 1, 2, 3, 4, 2, 3, 4, 5, 1])
    assert following == [6]


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], "6 tokens stand for pictures, but the pictures give 0"),
        ([(1, 4, 4)], "6 tokens stand for pictures, but the pictures give 4"),
        ([(1, 2, 2), (1, 2, 10)], "interrupted"),
    ],
)
def test_tokens_that_are_not_the_pictures(grids, message):
    config = Qwen25VLConfig(image_token_id=9)
    ids = np.asarray([[1, 9, 9, 9, 2, 9, 9, 9]])
    with pytest.raises(InputError, match=message):
        rope_positions(ids, np.asarray([8]), [grids], config)


def test_shapes_of_pictures():
    assert fit_size(512, 512, 28, 3136, 1_003_520) == (504, 504)
    assert fit_size(10, 200, 28, 3136, 10**6) == (28, 252)
    assert fit_size(10, 200, 28, 3136, 10**6, least=28) == (28, 196)
    with pytest.raises(InputError, match="at most 200 times"):
        fit_size(3, 1000, 28, 3136, 10**6)
    assert limited(Image.new("L", (1000, 500)), 76_800).size == (364, 168)
    assert fitted(Image.new("RGBA", (100, 50)), ImageProcessorConfig()).shape == (56, 112, 3)


def test_a_batch_has_few_sizes():
    config = Qwen25VLConfig(image_token_id=9)
    own = [QwenSample(np.full(length, 1, np.int32)) for length in (3, 70)]
    assert Sizes.bucketed(own, config, 8) == Sizes(8, 72)
    patches = np.zeros((16, 588), np.uint8)
    own.append(QwenSample(np.asarray([1, 9, 9, 9, 9], np.int32), ((patches, (1, 4, 4)),)))
    sizes = Sizes.bucketed(own, config, 4)
    assert sizes == Sizes(4, 72, 4, 64, 1)
    inputs = batch_of(own, config, pad=0, sizes=sizes)
    np.testing.assert_array_equal(inputs.live, [True, True, True, False])
    np.testing.assert_array_equal(inputs.places[2, :6], [-1, 0, 1, 2, 3, -1])
    assert np.all(inputs.places[[0, 1, 3]] == -1)
    assert inputs.patches.shape == (4, 64, 588)


def test_texts_with_pictures(golden):
    tokenizer = QwenTokenizer(golden / "qwen" / "base")
    text = tokenizer.chat(question("Look:", None, "What is it?", system="Be brief."))
    assert text.startswith("<|im_start|>system\n")
    assert "Be brief." in text
    assert text.endswith("<|im_start|>assistant\n")
    assert f"Look:<|vision_start|>{IMAGE}<|vision_end|>What is it?" in text
    assert expand_images(text, [3]).count(IMAGE) == 3
    with pytest.raises(InputError, match=r"2 times <\|image_pad\|>, for 1 pictures"):
        expand_images(text + IMAGE, [3])


def test_known_texts(golden):
    """The texts that the recordings name in their description."""
    tokenizer = QwenTokenizer(golden / "qwen" / "base")
    with np.load(golden / "qwen" / "golden_base.npz") as data:
        recorded = data["input_ids_text"]
    for text, row in zip(("a photo of a bench", "It's 3 blue cups!"), recorded, strict=True):
        np.testing.assert_array_equal(tokenizer.encode(text), row[row != tokenizer.pad])


def test_a_folder_that_is_not_whole(golden, tmp_path):
    base = golden / "qwen" / "base"
    with pytest.raises(InputError, match=r"tokenizer_config\.json: no such file"):
        QwenTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>"}')
    with pytest.raises(InputError, match="not a tokenizer"):
        QwenTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(base / "tokenizer.json")
    with pytest.raises(InputError, match="no chat template"):
        QwenTokenizer(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    with pytest.raises(InputError, match="patch_size is 16, the vision tower has 14"):
        read_image_processor_config(tmp_path, read_qwen_config(base))
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": false}')
    with pytest.raises(InputError, match="do_resize is false"):
        read_image_processor_config(tmp_path, read_qwen_config(base))


def changed(source, path, keys, value):
    """A copy of a JSON file in which one entry is another."""
    content = part = json.loads(source.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", "64", "hidden_size is '64'; expected a whole number above 0"),
        ("num_hidden_layers", 3.0, "num_hidden_layers is 3.0"),
        ("num_attention_heads", True, "num_attention_heads is True"),
        ("intermediate_size", 0, "intermediate_size is 0"),
        ("rms_norm_eps", "x", "rms_norm_eps is 'x'; expected a number"),
        ("rope_theta", "big", "rope_theta is 'big'; expected a number"),
        ("max_position_embeddings", "4096", "max_position_embeddings is '4096'"),
        ("text_config", [1], "text_config is [1]; expected an object"),
        ("rope_scaling", "default", "rope_scaling is 'default'; expected an object"),
        ("rope_scaling.mrope_section", "abc", "mrope_section is 'abc'; expected a list"),
        ("rope_scaling.mrope_section", 8, "mrope_section is 8; expected a list"),
        ("rope_scaling.rope_theta", "big", "rope_theta is 'big'; expected a number above 0"),
        ("image_token_id", "a", "image_token_id is 'a'; expected a whole number"),
        ("eos_token_id", "a", "eos_token_id is 'a'; expected a whole number from 0"),
        ("vision_config.depth", "3", "depth is '3'"),
        ("vision_config.fullatt_block_indexes", 1, "fullatt_block_indexes is 1; expected a list of whole numbers from"),
        ("vision_config.patch_size", 0, "patch_size is 0"),
        ("vision_config.num_heads", 0, "num_heads is 0"),
        ("vision_config.spatial_merge_size", 0, "spatial_merge_size is 0"),
    ],
)
def test_sizes_that_are_none(golden, tmp_path, key, value, message):
    path = tmp_path / "config.json"
    changed(golden / "qwen" / "base" / "config.json", path, key.split("."), value)
    with pytest.raises(InputError) as error:
        read_qwen_config(tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_sizes_that_a_file_leaves_open(golden, tmp_path):
    changed(golden / "qwen" / "base" / "config.json", tmp_path / "config.json", ["max_position_embeddings"], None)
    assert read_qwen_config(tmp_path).language.max_position_embeddings == 128_000


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("min_pixels", "a", "min_pixels is 'a'; expected a whole number above 0"),
        ("max_pixels", 0, "max_pixels is 0"),
        ("max_pixels", -5, "max_pixels is -5"),
        ("min_pixels", 10**7, "min_pixels is 10000000, more than max_pixels, 1003520"),
        ("size", 224, "size is 224; expected shortest_edge"),
        ("image_mean", [0.5], "three numbers each"),
        ("image_mean", "abc", "three numbers each"),
        ("image_std", [0, 0, 0], "those of image_std above 0"),
        ("rescale_factor", "x", "rescale_factor is 'x'; expected a number above 0"),
        ("resample", 99, "resample is 99; expected the number of a filter"),
    ],
)
def test_rules_that_are_none(golden, tmp_path, key, value, message):
    base, path = golden / "qwen" / "base", tmp_path / "preprocessor_config.json"
    changed(base / path.name, path, [key], value)
    with pytest.raises(InputError) as error:
        read_image_processor_config(tmp_path, read_qwen_config(base))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_one_mean_for_all_channels():
    one, three = (ImageProcessorConfig.from_json({"image_mean": mean}) for mean in (0.5, [0.5] * 3))
    np.testing.assert_array_equal(one.levels, three.levels)
    assert hash(one) != hash(three)


def test_pixels_are_normalised_as_other_verifiers_do(golden):
    """Level by level, to the last bit."""
    base = golden / "qwen" / "base"
    rules, patches = (
        read_image_processor_config(base, read_qwen_config(base)),
        np.arange(588, dtype=np.int64).reshape(1, 1, 588) % 256,
    )
    want = levels_in(json.loads((base / "preprocessor_config.json").read_text()), "here")
    frames = np.asarray(normalised(jnp.asarray(patches, jnp.uint8), rules)).reshape(3, 2, 196)
    for channel, pixels in enumerate(patches.reshape(3, 196)):
        np.testing.assert_array_equal(frames[channel], [want[pixels, channel]] * 2)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("tokenizer_config.json", "pad_token", 5, "pad_token is 5; expected a text"),
        ("tokenizer_config.json", "eos_token", {"x": 1}, "eos_token is {'x': 1}; expected a text"),
        ("chat_template.json", "chat_template", "{% for", "the chat template does not work (unexpected 'end"),
        ("chat_template.json", "chat_template", "{{ raise_exception('no') }}", "the chat template does not work (no)"),
        ("chat_template.json", "chat_template", [1], "chat_template is a list; expected a text"),
    ],
)
def test_tokens_and_templates_that_are_none(golden, tmp_path, file, key, value, message):
    base = golden / "qwen" / "base"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    changed(base / file, tmp_path / file, [key], value)
    with pytest.raises(InputError) as error:
        QwenTokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}: ")
    assert message in str(error.value)


def test_rules_of_newer_folders(golden, tmp_path):
    """Transformers 5 puts the image processor's rules into the processor's file."""
    base = golden / "qwen" / "base"
    config, rules = read_qwen_config(base), json.loads((base / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": rules}))
    assert (
        read_image_processor_config(tmp_path, config)
        == read_image_processor_config(base, config)
        == ImageProcessorConfig(max_pixels=1_003_520)
    )


@pytest.fixture(scope="module")
def prepare(golden) -> QwenProcessor:
    base = golden / "qwen" / "base"
    config = read_qwen_config(base)
    return QwenProcessor(
        QwenTokenizer(base), read_image_processor_config(base, config), config, context=200, max_pixels=76_800
    )


def test_what_a_chat_cannot_be(prepare, tmp_path):
    picture = Image.new("RGB", (112, 112))
    with pytest.raises(InputError, match="the model reads 200"):
        prepare.sample((picture, "long " * 100))
    with pytest.raises(InputError, match="for 1 pictures"):
        prepare.sample((picture, f"a text with {IMAGE} in it"))
    (tmp_path / "cut.png").write_bytes(_png(picture, tmp_path)[:-60])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(InputError, match="cannot be decoded"):
        prepare.sample((cut, "what?"))
    with pytest.raises(InputError, match="at most 200 times"):
        prepare.sample((Image.new("RGB", (2000, 3)), "what?"))


def _png(picture, folder) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (*picture.size, 3), np.uint8)
    Image.fromarray(noise).save(folder / "whole.png")
    return (folder / "whole.png").read_bytes()
