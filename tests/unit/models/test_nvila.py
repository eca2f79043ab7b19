"""NVILA's way of cutting images and asking, against what VILA's own code was recorded to do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.models.nvila import MEDIA, Marks, NvilaConfig, Tiling, ask, chat, lay_out, message
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.siglip import SiglipVisionConfig
from rflow_jax.parity.nvila import pattern
from rflow_jax.tokenizers.nvila import NvilaTokenizer
from rflow_jax.utils.images import levels_in
from rflow_jax.vlm.nvila_programs import NvilaPrograms, NvilaQuery, padded_length
from rflow_jax.weights.nvila import load_nvila, read_nvila_config


@pytest.fixture(scope="module")
def checkpoint(golden):
    return golden / "nvila" / "checkpoint"


@pytest.fixture(scope="module")
def meta(golden):
    return json.loads((golden / "nvila" / "golden" / "meta.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return NvilaTokenizer(checkpoint / "llm", read_nvila_config(checkpoint).language)


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_tiles_to_the_last_level(meta, checkpoint):
    levels = levels_in(json.loads((checkpoint / "vision_tower" / "preprocessor_config.json").read_text()), "here")
    assert len(meta["tiling_cases"]) == 16
    for case in meta["tiling_cases"]:
        image = pattern(case["width"], case["height"], meta["pattern_k"], meta["pattern"])
        assert sha256(image) == case["source_sha256"]
        tiling = Tiling(case["tile_size"])
        assert tiling.grid(case["width"], case["height"]) == (case["columns"], case["rows"])
        pictures = tiling.cut(Image.fromarray(image))
        assert [sha256(picture) for picture in pictures] == case["tile_u8_sha256"]
        pixels = levels[pictures, np.arange(3)].transpose(0, 3, 1, 2)
        assert sha256(pixels) == case["pixel_values_f32_sha256"]


@pytest.mark.parametrize("mode", ["mode_rgba", "mode_l"])
def test_other_kinds_of_images(golden, meta, mode):
    source = np.load(golden / "nvila" / "golden" / "tiling.npz")[f"{mode}_source"]
    pictures = Tiling(112).cut(Image.fromarray(source))
    assert [sha256(picture) for picture in pictures] == meta[mode]["tile_u8_sha256"]


def test_tokens(meta, tokenizer):
    for case in meta["tokenizer_cases"]:
        assert tokenizer.ids(case["text"]) == case["ids"], case["text"]
    assert (tokenizer.yes, tokenizer.no, tokenizer.size) == (meta["yes_id"], meta["no_id"], meta["len_tokenizer"])
    assert tokenizer.marks.newline == tuple(meta["newline_ids"])
    assert tokenizer.context == meta["default_generation_config"]["max_length"]


def test_tokens_without_the_ready_made_file(meta, checkpoint, tmp_path):
    """The published checkpoint has the vocabulary and the merges only."""
    shutil.copytree(checkpoint / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("tokenizer.json"))
    tokenizer = NvilaTokenizer(tmp_path / "llm", read_nvila_config(checkpoint).language)
    for case in meta["tokenizer_cases"]:
        assert tokenizer.ids(case["text"]) == case["ids"], case["text"]
    assert (tokenizer.yes, tokenizer.size) == (meta["yes_id"], meta["len_tokenizer"])


def without_tokens(src, dst, tokens):
    """A copy of a tokenizer's folder without some of its added tokens."""
    shutil.copytree(src, dst)
    for name in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((dst / name).read_text())
        if name == "tokenizer.json":
            content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] not in tokens]
        elif name == "added_tokens.json":
            content = {token: number for token, number in content.items() if token not in tokens}
        else:
            content.pop("additional_special_tokens", None)
            known = content.get("added_tokens_decoder", {})
            content |= {"added_tokens_decoder": {k: v for k, v in known.items() if v["content"] not in tokens}}
        (dst / name).write_text(json.dumps(content))
    return dst


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("rows", [0, 3])
def test_media_tokens_are_added_as_vila_adds_them(meta, checkpoint, tokenizer, tmp_path, ready, rows):
    """They may lie beyond the network's embedding: no input has them."""
    folder = without_tokens(checkpoint / "llm", tmp_path / "llm", MEDIA)
    if not ready:
        (folder / "tokenizer.json").unlink()
    language = dataclasses.replace(read_nvila_config(checkpoint).language, vocab_size=tokenizer.size - 3 + rows)
    grown = NvilaTokenizer(folder, language)
    assert [grown.ids(token) for token in MEDIA] == [[591], [592], [593]] == [tokenizer.ids(token) for token in MEDIA]
    assert (grown.marks, grown.size) == (tokenizer.marks, language.vocab_size)
    for case in meta["tokenizer_cases"]:
        assert grown.ids(case["text"]) == case["ids"], case["text"]
    layout = grown.layout(chat(message([2, "a bench"])), 9)
    assert layout.ids.max() < tokenizer.size - 3
    assert all(
        (one == other).all()
        for one, other in zip(
            vars(layout).values(), vars(tokenizer.layout(chat(message([2, "a bench"])), 9)).values(), strict=True
        )
    )
    with pytest.raises(InputError, match="the special token <vila/sentinel>"):
        grown.require_plain("a <vila/sentinel> bench")


def test_of_the_media_tokens_only_the_missing_ones_are_added(checkpoint, tokenizer, tmp_path):
    folder = without_tokens(checkpoint / "llm", tmp_path / "llm", MEDIA[1:])
    assert [NvilaTokenizer(folder, read_nvila_config(checkpoint).language).ids(token) for token in MEDIA] == [
        [591],
        [592],
        [593],
    ]
    language = dataclasses.replace(read_nvila_config(checkpoint).language, vocab_size=590)
    with pytest.raises(InputError, match=r"'\[PAD\]' is token 590, the network's vocab_size is 590"):
        NvilaTokenizer(folder, language)


@pytest.fixture(scope="module")
def edge_questions(meta, tokenizer):
    """Every recorded odd way of asking -> (our text, our question)."""
    tiling, made = Tiling(112), {}
    for name, case in meta["edge_cases"].items():
        sizes = [tuple(map(int, part[5:-1].split("x"))) for part in case["parts"] if part.startswith("<PIL ")]
        images = [Image.fromarray(pattern(*size, meta["edge_cases_pattern_k"], meta["pattern"])) for size in sizes]
        # Several images are not cut into tiles.
        pictures = [tiling.cut(image) if len(images) == 1 else tiling.square(image) for image in images]
        counts = iter([len(some) for some in pictures])
        text = chat(message([next(counts) if part.startswith("<PIL ") else part for part in case["parts"]]))
        together = np.concatenate(pictures) if pictures else np.zeros((0, 112, 112, 3), np.uint8)
        made[name] = (text, NvilaQuery(together, tokenizer.layout(text, 9)))
    return made


def test_odd_ways_of_asking(meta, tokenizer, edge_questions):
    for name, case in meta["edge_cases"].items():
        text, question = edge_questions[name]
        assert text == case["text"], name
        assert tokenizer.ids(text) == case["input_ids"], name
        assert len(question.layout) == case["positions"], name
        assert len(question.pictures) == case["image_tokens"], name


def test_answers_to_odd_ways_of_asking(meta, checkpoint, edge_questions):
    model = load_nvila(str(checkpoint), dtype=np.float32, progress=False)
    with jax.default_matmul_precision("highest"):
        logits = NvilaPrograms(model, 4).first_logits([question for _, question in edge_questions.values()])
    got = logits[:, [meta["yes_id"], meta["no_id"]]]
    want = [case["score_yes_no"] for case in meta["edge_cases"].values()]
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_layout_by_hand():
    marks = Marks(image=9, newline=(5, 6), skipped={1, 2})
    layout = lay_out([1, 2, 3, 1, 9, 2, 1, 4, 2, 9, 9], marks, tokens=2)
    np.testing.assert_array_equal(layout.ids, [3, 1, 0, 0, 5, 6, 4, 2, 0, 0, 5, 6, 0, 0, 5, 6])
    np.testing.assert_array_equal(layout.kind, [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2])
    np.testing.assert_array_equal(layout.feature, [-1, -1, 0, 1, -1, -1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1])
    np.testing.assert_array_equal(layout.picture, [-1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(layout.source, [2, 3, 4, 4, 4, 4, 7, 8, 9, 9, 9, 9, 10, 10, 10, 10])


def test_a_prompt_cannot_break_the_question():
    assert "{prompt}" in ask("{prompt} {message}", "question")
    assert ask("a cat", "raw") == "a cat"
    assert "{message}" in chat("{message}")
    assert message([2, "a <vila/video> b <image>"]) == "<image>\n<image>\na  b"


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 64), (64, 64), (65, 96), (97, 128), (129, 192), (700, 768), (4000, 4096), (4095, 4096)]
)
def test_padded_lengths(length, padded):
    assert padded_length(length, 4096) == padded


def test_padding_stops_at_the_context():
    assert padded_length(70, 80) == 80
    assert padded_length(90, 80) == 90


SIZES = SiglipVisionConfig(), Qwen2Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"image_aspect_ratio": "resize"}, "image_aspect_ratio 'resize'"),
        ({"dynamic_s2": True}, "dynamic_s2 True"),
        ({"mm_vision_select_feature": "patch"}, "'patch'"),
        ({"mm_vision_select_layer": -40}, "mm_vision_select_layer -40"),
        ({"max_tiles": 0}, "max_tiles 0"),
        ({"max_tiles": "many"}, "'many'"),
        ({"image_encoder": '{"_target_": "llava.model.encoders.TSPVideoEncoder"}'}, "TSPVideoEncoder"),
        ({"image_encoder": '{"_target_": "BasicImageEncoder", "end_tokens": "x"}'}, "end_tokens"),
        ({"image_encoder": "{"}, "image_encoder '{'"),
    ],
)
def test_what_is_not_supported_is_named(checkpoint, change, message):
    content = json.loads((checkpoint / "config.json").read_text())
    with pytest.raises(InputError, match=message):
        NvilaConfig.from_json(content | change, *SIZES)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("mm_projector", {"mm_projector_type": "mlp_downsample"}, "mm_projector_type 'mlp_downsample'"),
        ("vision_tower", {"model_type": "clip_vision_model"}, "model_type 'clip_vision_model'"),
        ("vision_tower", {"num_attention_heads": 5}, "num_attention_heads 5"),
        ("vision_tower", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("vision_tower", {"patch_size": 200}, "patch_size 200"),
        ("llm", {"model_type": "llama"}, "model_type 'llama'"),
        ("llm", {"hidden_size": -1}, "hidden_size is -1"),
    ],
)
def test_a_checkpoint_of_another_architecture(checkpoint, tmp_path, file, change, message):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    path = folder / file / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message) as caught:
        load_nvila(str(folder), progress=False)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
