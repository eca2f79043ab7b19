"""NVILA as a verifier: labels, batches, what cannot be scored, and its conversion."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from convert_weights.__main__ import main
from rflow_jax.errors import InputError
from rflow_jax.parity.nvila import pattern
from rflow_jax.utils.batching import BATCHES_AT_ONCE, CLOSED
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.config import NvilaVerifierConfig
from rflow_jax.verifiers.nvila import NvilaVerifier
from rflow_jax.weights.nvila import load_nvila

PATTERN = {"a": 3, "b": 1, "p1": 97, "d": 2, "p2": 61, "s": 16, "p3": 127}
SHAPES = [(150, 100), (40, 40), (60, 60), (96, 128), (112, 56)]
IMAGES = [Image.fromarray(pattern(*shape, k, PATTERN)) for k, shape in enumerate(SHAPES)]
ITEMS = [{"prompt": prompt} for prompt in ("a bench", "two red apples", "a purple dog", "a cup", "a bench")]


@pytest.fixture(scope="module")
def checkpoint(golden):
    return golden / "nvila" / "checkpoint"


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_nvila(str(checkpoint), dtype=jnp.float32, progress=False)


@pytest.fixture(scope="module")
def verifier(model):
    return NvilaVerifier(NvilaVerifierConfig(batch_size=2), model)


@pytest.fixture(scope="module")
def verdicts(verifier):
    return verifier.score(IMAGES, ITEMS)


@pytest.fixture
def recorded(golden):
    """A prompt's recorded yes and no logits on the first image, in each mode."""
    meta = json.loads((golden / "nvila" / "golden" / "meta.json").read_text())
    image = Image.fromarray(np.load(golden / "nvila" / "golden" / "vision_imgA.npz")["image"])
    scores = {
        mode: np.load(golden / "nvila" / "golden" / f"case_imgA_p1_{mode}.npz")["score_yes_no"]
        for mode in ("chat", "sana")
    }
    return image, {"prompt": meta["cases"]["imgA_p1_chat"]["prompt"]}, scores


def test_protocol(verifier, model):
    assert isinstance(verifier, Verifier)
    assert (verifier.name, verifier.concurrency, verifier.batch_size) == ("nvila", 1, 2)
    closed = NvilaVerifier(NvilaVerifierConfig(batch_size=2), model)
    closed.close()
    assert {verdict.error for verdict in closed.score(IMAGES, ITEMS)} == {CLOSED}


def test_word_and_margin_of_both_templates(model, recorded):
    image, item, scores = recorded
    found = {}
    for template, mode in (("raw", "chat"), ("question", "sana")):
        for rank in ("word", "margin"):
            verifier = NvilaVerifier(NvilaVerifierConfig(template=template, rank=rank, batch_size=2), model)
            with jax.default_matmul_precision("highest"):
                (found[mode, rank],) = verifier.score([image], [item])
    assert [(found[mode, "word"].label) for mode in ("chat", "sana")] == ["no", "yes"]
    assert found["chat", "word"].score == pytest.approx(scores["chat"][1], abs=1e-4)
    assert found["sana", "word"].score == pytest.approx(scores["sana"][0], abs=1e-4)
    assert found["chat", "word"].raw["answer"] == "no"
    for mode in ("chat", "sana"):
        assert found[mode, "margin"].label is None
        assert found[mode, "margin"].score == pytest.approx(scores[mode][0] - scores[mode][1], abs=1e-4)
    assert found["sana", "word"].rank > found["chat", "word"].rank


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_do_not_depend_on_the_batch(model, verdicts, batch_size):
    other = NvilaVerifier(NvilaVerifierConfig(batch_size=batch_size), model)
    order = [3, 0, 4, 1, 2]
    again = other.score([IMAGES[k] for k in order], [ITEMS[k] for k in order])
    for k, verdict in zip(order, again, strict=True):
        for word in ("yes", "no"):
            assert verdict.raw[word] == pytest.approx(verdicts[k].raw[word], rel=1e-5, abs=1e-5)


def test_neighbours_change_nothing_at_all(verifier, verdicts):
    """At one batch size not even rounding differs."""
    alone = [verifier.score([image], [item])[0] for image, item in zip(IMAGES, ITEMS, strict=True)]
    assert [verdict.raw for verdict in alone] == [verdict.raw for verdict in verdicts]
    assert len({verdict.score for verdict in verdicts}) == len(verdicts)


def test_more_images_than_are_prepared_at_once(verifier, verdicts):
    many = [k % len(IMAGES) for k in range(2 * BATCHES_AT_ONCE * verifier.batch_size - 3)]
    found = verifier.score([IMAGES[k] for k in many], [ITEMS[k] for k in many])
    assert [verdict.raw for verdict in found] == [verdicts[k].raw for k in many]


def broken_image():
    file = io.BytesIO()
    IMAGES[0].save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:300]))


def test_what_cannot_be_scored_is_an_error_of_its_own(verifier, verdicts, caplog):
    images = [IMAGES[0], broken_image(), IMAGES[1], IMAGES[2], IMAGES[2]]
    items = [ITEMS[0], ITEMS[0], {"prompt": "long " * 3000}, {"tag": "counting"}, ITEMS[2]]
    found = verifier.score(images, items)
    assert [verdict.scored for verdict in found] == [True, False, False, False, True]
    assert [found[k].raw for k in (0, 4)] == [verdicts[k].raw for k in (0, 2)]
    assert "cannot be decoded" in found[1].error
    assert "too long" in found[2].error
    assert "4096" in found[2].error
    assert "no prompt" in found[3].error
    assert caplog.text.count("no score for an image") == 3


def test_nothing_to_score(verifier):
    assert verifier.score([], []) == []
    assert [verdict.scored for verdict in verifier.score([broken_image()], [ITEMS[0]])] == [False]


def test_a_logit_that_is_no_number(verifier, verdicts, monkeypatch):
    right = verifier._programs.first_logits

    def first_logits(questions):
        logits = right(questions)
        logits[1, 7] = np.nan
        return logits

    monkeypatch.setattr(verifier._programs, "first_logits", first_logits)
    found = verifier.score(IMAGES, ITEMS)
    assert [verdict.scored for verdict in found] == [True, False, True, True, True]
    assert "not a number" in found[1].error
    assert found[2] == verdicts[2]


def test_bfloat16_is_near(checkpoint, verdicts):
    half = NvilaVerifier(NvilaVerifierConfig(str(checkpoint), batch_size=2)).score(IMAGES[:2], ITEMS[:2])
    for verdict, wanted in zip(half, verdicts, strict=False):
        assert verdict.label == wanted.label
        # Eight bits of precision, and this network's rows for the two words are enlarged.
        assert verdict.raw["yes"] == pytest.approx(wanted.raw["yes"], abs=1.0)
        assert verdict.raw["yes"] != wanted.raw["yes"]


@pytest.mark.parametrize(("format", "dtype"), [("safetensors", None), ("orbax", "float32"), ("safetensors", "float16")])
def test_converted(checkpoint, verdicts, tmp_path, format, dtype):
    out = tmp_path / "converted"
    how = ["--format", format, *(["--dtype", dtype] if dtype else [])]
    assert main(["nvila", str(checkpoint), str(out), *how]) == 0
    assert not list(out.rglob("model.safetensors"))
    # The recorded weights were chosen so that all of these number types hold them.
    converted = NvilaVerifier(NvilaVerifierConfig(str(out), batch_size=2, dtype="float32"))
    assert [verdict.raw for verdict in converted.score(IMAGES, ITEMS)] == [verdict.raw for verdict in verdicts]
    with pytest.raises(InputError, match="is a converted model already"):
        main(["nvila", str(out), str(tmp_path / "again")])


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copied")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mm_projector", lambda x: x.pop("layers.4.bias"), r"layers\.4\.bias missing"),
        ("mm_projector", lambda x: x.update({"layers.9.bias": x["layers.1.bias"]}), r"layers\.9\.bias not known"),
        ("vision_tower", lambda x: x.pop("vision_model.post_layernorm.bias"), r"post_layernorm\.bias missing"),
        ("llm", lambda x: x.update({"model.norm.weight": np.ones(7, np.float32)}), r"norm\.weight has shape \[7\]"),
    ],
)
@pytest.mark.parametrize("use", [lambda src, _: load_nvila(src, progress=False), lambda *ends: main(["nvila", *ends])])
def test_keys_and_shapes_are_exact(copied, tmp_path, part, change, message, use):
    file = copied / part / "model.safetensors"
    tensors = {key: np.asarray(value, np.float32) for key, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(InputError, match=message) as caught:
        use(str(copied), str(tmp_path / "out"))
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_is_stored_is_left_out(copied, verdicts):
    file = copied / "llm" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file)
    verifier = NvilaVerifier(NvilaVerifierConfig(str(copied), batch_size=2, dtype="float32"))
    assert verifier.score(IMAGES[:1], ITEMS[:1])[0].raw == verdicts[0].raw


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vision_tower/preprocessor_config.json", {"size": {"height": 98, "width": 98}}, "112 pixels"),
        ("vision_tower/preprocessor_config.json", {"do_normalize": False}, "do_normalize must be true"),
        ("vision_tower/preprocessor_config.json", {"image_mean": [1, 2]}, "three numbers"),
        ("llm/tokenizer_config.json", {"eos_token": None}, "no eos_token"),
        ("llm/config.json", {"vocab_size": 500}, "is token 590, the network's vocab_size is 500"),
    ],
)
def test_what_surrounds_the_weights(copied, file, change, message):
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_nvila(str(copied), progress=False)


def test_a_folder_that_is_no_nvila(golden, tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json, vision_tower/config\.json"):
        load_nvila(str(golden / "pipeline"), progress=False)
    with pytest.raises(InputError, match="no such file or folder"):
        load_nvila(str(tmp_path / "none"), progress=False)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"dtype": "float16"}, {"dtype": "int8"}])
def test_bad_settings(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        dataclasses.replace(NvilaVerifierConfig(), **wrong)
