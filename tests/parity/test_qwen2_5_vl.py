"""Qwen2.5-VL against Transformers: preparation, tower, positions, logits and generation."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from rflow_jax.models.qwen2.generation import Decoding
from rflow_jax.models.qwen2_5_vl.layout import window_order
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, abstract_qwen2_5_vl
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.vlm.qwen_batching import QwenInputs, Sizes, batch_of
from rflow_jax.vlm.qwen_processing import (
    QwenProcessor,
    fit_size,
    fitted,
    normalised,
    patches_of,
    read_image_processor_config,
)
from rflow_jax.vlm.qwen_programs import embed, hidden_states, texts
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings.qwen import qwen2_5_vl_mapping
from rflow_jax.weights.qwen import load_qwen, read_qwen_config
from rflow_jax.weights.safetensors_io import TensorFiles
from tests.kit.compare import relative_error
from tests.kit.pictures import picture
from tests.kit.qwen import END, PAD, SHAPES, TOKENS, make
from tests.kit.torch_models import on_meta, shapes_of
from tests.unit.models.test_qwen_sizes import REAL

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
# A picture that windows fill exactly, two of different sizes, none.
CHATS = (
    (picture(112, 112), "What is it?"),
    ("Compare", picture(170, 90, 1), "with", picture(60, 130, 2), "in one short sentence, please."),
    ("Say something.",),
)


class Pair(NamedTuple):
    """Transformers' module, and ours read from its folder."""

    folder: Any
    theirs: Any
    ours: Qwen25VL
    prepare: QwenProcessor


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory, golden) -> Pair:
    folder = tmp_path_factory.mktemp("qwen")
    theirs = make(folder, SHAPES[request.param], tokenizer=golden / "qwen" / "base")
    ours = load_qwen(folder, dtype=jnp.float32)
    prepare = QwenProcessor(
        QwenTokenizer(folder), read_image_processor_config(folder, ours.config), ours.config, context=4096
    )
    return Pair(folder, theirs, ours, prepare)


@pytest.fixture(scope="module")
def samples(pair):
    return [pair.prepare.sample(parts) for parts in CHATS]


def batch(pair, samples, rows: int | None = None) -> QwenInputs:
    sizes = Sizes.bucketed(samples, pair.ours.config, rows or len(samples))
    return batch_of(samples, pair.ours.config, pad=PAD, sizes=sizes)


def packed(prepare, samples) -> dict[str, Any]:
    """What Transformers' module takes for these samples, padded to the longest."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest), PAD)
    mask = torch.zeros((len(samples), longest), dtype=torch.long)
    for k, sample in enumerate(samples):
        ids[k, : len(sample.ids)] = torch.from_numpy(sample.ids)
        mask[k, : len(sample.ids)] = 1
    pictures = [one for sample in samples for one in sample.pictures]
    given = {"input_ids": ids, "attention_mask": mask}
    if pictures:
        values = [normalised(jnp.asarray(patches)[None], prepare.rules)[0] for patches, _ in pictures]
        given["pixel_values"] = torch.from_numpy(np.concatenate(values))
        given["image_grid_thw"] = torch.tensor([grid for _, grid in pictures])
    return given


@partial(jax.jit, static_argnums=(0, 1))
def _hidden(graph, rules, state, inputs):
    model = nnx.merge(graph, state)
    return hidden_states(model, embed(model, rules, inputs), inputs, True)


def test_preparation(pair, golden):
    """Our patches are the slow processor's, of pictures small, large and odd; the chat is its template's."""
    rules = pair.prepare.rules
    names = ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
    theirs = Qwen2VLImageProcessor(**{name: getattr(rules, name) for name in names})
    for size in ((112, 112), (37, 23), (500, 310), (1200, 40), (9, 70)):
        want = theirs(picture(*size), return_tensors="np")
        patches, grid = patches_of(fitted(picture(*size), rules), rules)
        np.testing.assert_array_equal(grid, want["image_grid_thw"][0])
        assert relative_error(normalised(jnp.asarray(patches)[None], rules)[0], want["pixel_values"]) < 3e-7
    tokenizer = transformers.AutoTokenizer.from_pretrained(golden / "qwen" / "base")
    for text in ("a photo of a bench", "It's 3 blue cups!\n<|im_end|>", "Füße, 你好"):
        np.testing.assert_array_equal(pair.prepare.tokenizer.encode(text), tokenizer(text)["input_ids"])


def test_sizes_of_pictures():
    draw = np.random.default_rng(0)
    for height, width in draw.integers(5, 900, (300, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            limits = (28, 3136, int(draw.integers(20_000, 400_000)))
            assert fit_size(height, width, *limits) == smart_resize(height, width, *limits)


def test_tower(pair, samples):
    """Windows, whole pictures, the order of both, and no sight of padding or of the neighbour."""
    inputs, given = batch(pair, samples), packed(pair.prepare, samples)
    with torch.no_grad():
        want = pair.theirs.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
    patches = normalised(jnp.asarray(inputs.patches), pair.prepare.rules)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(pair.ours.vision)(patches, inputs.layout)
    counts = [len(one) // pair.ours.config.vision.unit for sample in samples for one, _ in sample.pictures]
    ours = np.concatenate([row[:count] for row, count in zip(np.asarray(got), counts, strict=False)])
    assert relative_error(ours, want) < TOLERANCE


def test_windows_and_positions(pair, samples):
    given, config = packed(pair.prepare, samples), pair.ours.config
    want, lengths = pair.theirs.model.visual.get_window_index(given["image_grid_thw"])
    orders, sizes, before = [], [0], 0
    for grid in (tuple(map(int, row)) for row in given["image_grid_thw"]):
        order, own = window_order(grid, config.vision)
        orders.append(order + before)
        sizes.extend(own)
        before += len(order)
    np.testing.assert_array_equal(np.concatenate(orders), want)
    np.testing.assert_array_equal(np.cumsum(sizes), lengths)
    positions, deltas = pair.theirs.model.get_rope_index(
        given["input_ids"], given["image_grid_thw"], attention_mask=given["attention_mask"]
    )
    inputs = batch(pair, samples)
    for k, sample in enumerate(samples):
        count = len(sample.ids)
        np.testing.assert_array_equal(inputs.positions[:, k, :count], positions[:, k, :count])
    np.testing.assert_array_equal(inputs.next_position - given["input_ids"].shape[1], deltas[:, 0])


def test_hidden_states_and_logits(pair, samples):
    """A padded batch with pictures of different sizes, several of one sample, and none of another."""
    inputs, given = batch(pair, samples), packed(pair.prepare, samples)
    with torch.no_grad():
        want = pair.theirs(**given, output_hidden_states=True)
    graph, state = nnx.split(pair.ours)
    with jax.default_matmul_precision("highest"):
        hidden = _hidden(graph, pair.prepare.rules, state, inputs)
        logits = pair.ours.language.logits(hidden)
    for k, sample in enumerate(samples):
        count = len(sample.ids)
        assert relative_error(hidden[k, :count], want.hidden_states[-1][k, :count]) < TOLERANCE
        assert relative_error(logits[k, :count], want.logits[k, :count]) < TOLERANCE


def test_generation(pair, samples):
    """Every sample of a batch, and of a batch that is not full, goes on as Transformers goes on with it alone."""
    how = Decoding(7, (END,), PAD, keep_logits=True)
    graph, state = nnx.split(pair.ours)
    with jax.default_matmul_precision("highest"):
        made = texts(graph, pair.prepare.rules, how, state, batch(pair, samples, rows=4))
    assert made.lengths[3] == 0
    for k, sample in enumerate(samples):
        with torch.no_grad():
            want = pair.theirs.generate(
                **packed(pair.prepare, [sample]),
                max_new_tokens=7,
                do_sample=False,
                eos_token_id=END,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = want.sequences[0, len(sample.ids) :].numpy()
        np.testing.assert_array_equal(made.tokens[k, : len(tokens)], tokens)
        assert relative_error(made.logits[k, : len(tokens)], torch.stack(want.logits, 1)[0]) < TOLERANCE


def test_generation_with_a_repetition_penalty(pair, samples):
    """As Transformers with each sample alone: its padding and its neighbours are no repetition."""
    how = Decoding(7, (END,), PAD, repetition_penalty=1.3)
    graph, state = nnx.split(pair.ours)
    inputs = batch(pair, samples, rows=4)
    with jax.default_matmul_precision("highest"):
        made = texts(graph, pair.prepare.rules, how, state, inputs)
        free = texts(graph, pair.prepare.rules, replace(how, repetition_penalty=1.0), state, inputs)
    assert np.any(np.asarray(made.tokens) != np.asarray(free.tokens))
    for k, sample in enumerate(samples):
        rules = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD}
        with torch.no_grad():
            want = pair.theirs.generate(**packed(pair.prepare, [sample]), **rules, repetition_penalty=1.3)
        tokens = want[0, len(sample.ids) :].numpy()
        np.testing.assert_array_equal(made.tokens[k, : len(tokens)], tokens)


def test_newer_names_of_keys(pair, tmp_path):
    """Transformers 5 nests both parts under ``model``; the same weights come out."""
    tensors = {}
    for shard in sorted(pair.folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    renamed = {_nested(key): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((pair.folder / "config.json").read_text())
    again = load_qwen(tmp_path, dtype=jnp.float32)
    for one, other in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(pair.ours)), strict=True):
        np.testing.assert_array_equal(one, other)


def _nested(key: str) -> str:
    for plain, nested in (("model.", "model.language_model."), ("visual.", "model.visual.")):
        if key.startswith(plain):
            return nested + key.removeprefix(plain)
    return key


@pytest.mark.parametrize("name", REAL)
def test_real_sizes(name):
    """Parameters and keys of the published sizes."""
    config, parameters, _ = REAL[name]
    text = {key: value for key, value in vars(config.language).items() if key != "mrope_section"}
    rope = {"type": "mrope", "mrope_section": list(config.language.mrope_section)}
    vision = vars(config.vision) | {"fullatt_block_indexes": list(config.vision.fullatt_block_indexes)}
    theirs = transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_scaling": rope},
        vision_config=vision,
        tie_word_embeddings=config.language.tie_word_embeddings,
    )
    meta = on_meta(transformers.Qwen2_5_VLForConditionalGeneration, theirs)
    assert sum(p.numel() for p in meta.parameters()) == parameters
    model = abstract_qwen2_5_vl(config)
    the_plan = plan(qwen2_5_vl_mapping(shapes_of(meta), head=model.language.head is not None), parameter_shapes(model))
    the_plan.check(shapes_of(meta), "meta device")


def test_layouts_of_the_configuration(pair, golden):
    """What Transformers 4.57 writes, what 5 writes, and the flat one of the published files give the same sizes."""
    nested = json.loads((pair.folder / "config.json").read_text())
    text = nested["text_config"]
    newest = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_theta")}
    newest["rope_parameters"] = {"rope_type": "default", "rope_theta": text["rope_theta"]} | {
        "mrope_section": text["rope_scaling"]["mrope_section"]
    }
    flat = {key: value for key, value in nested.items() if key != "text_config"} | text | {"model_type": "qwen2_5_vl"}
    flat.setdefault("tie_word_embeddings", nested.get("tie_word_embeddings"))
    want = type(pair.ours.config).from_json(nested)
    assert want == pair.ours.config == read_qwen_config(pair.folder)
    assert type(want).from_json(nested | {"text_config": newest}) == want
    assert type(want).from_json(flat) == want
    assert TOKENS["image_token_id"] == want.image_token_id
    assert TensorFiles.open(pair.folder).files[1:]  # in shards
