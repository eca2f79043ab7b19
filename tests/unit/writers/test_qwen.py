"""Reflections and prompts written by a Qwen2.5-VL in this process (here a tiny one, which writes nonsense)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import rflow_jax.writers
from rflow_jax.errors import InputError
from rflow_jax.models.qwen2.generation import Prompts, _tokens_of, penalised
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat, decoding_of, question_key
from rflow_jax.weights.qwen import repetition_penalty
from rflow_jax.writers import make_text_generator
from rflow_jax.writers.base import PastImage, QwenTextGeneratorConfig, TextGenerator, WriterInput
from rflow_jax.writers.qwen import QwenTextGenerator, _written
from tests.kit.hub import FakeHub

PROMPTS = Path(rflow_jax.writers.__file__).parent / "prompts"
REFLECTION, REFINE = PROMPTS / "reflection.md", PROMPTS / "refine.md"


def picture(width, height):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


CASES = (
    WriterInput(picture(120, 80), "a photo of a bench", "a photo of a bench", "Overall: 3\nno bench"),
    WriterInput(picture(64, 140), "two clocks", "two clocks on a wall", "Overall: 7", "Add a second clock."),
    WriterInput(picture(90, 90), "x", "x", ""),
)


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def config(golden) -> QwenChatConfig:
    return QwenChatConfig(str(golden / "qwen" / "base"), dtype="float32", batch_size=4, max_new_tokens=8)


@pytest.fixture(scope="module")
def greedy(config) -> QwenChat:
    return QwenChat(config)


@pytest.fixture(scope="module")
def drawn(config) -> QwenChat:
    return QwenChat(replace(config, temperature=1.5, top_p=0.95, seed=3))


def test_both_roles_share_a_model(greedy):
    reflector, refiner = QwenTextGenerator(greedy, REFLECTION), QwenTextGenerator(greedy, REFINE)
    assert isinstance(reflector, TextGenerator)
    assert (reflector.name, reflector.concurrency, reflector.batch_size) == ("qwen base", 1, 4)
    one, other = reflector.write(CASES), refiner.write(CASES)
    assert all(written.text for written in one + other)
    assert [written.text for written in one] != [written.text for written in other]


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_a_text_depends_on_its_case_alone(request, config, name):
    """Not on the batch, on the order, or on the padding; drawn ones neither."""
    chat = request.getfixturevalue(name)
    writer = QwenTextGenerator(chat, REFLECTION)
    want = [written.text for written in writer.write(CASES)]
    assert [written.text for written in writer.write(CASES[::-1])][::-1] == want
    alone = QwenTextGenerator(QwenChat(replace(chat.config, batch_size=1)), REFLECTION)
    assert [alone.write([case])[0].text for case in CASES] == want


def test_seeds(drawn, config):
    question = ChatQuery("Be brief.", ("What is it?", picture(60, 60)))
    assert np.any(question_key(question, 3) != question_key(question, 4))
    assert np.any(question_key(question, 3) != question_key(replace(question, instructions=None), 3))
    other = QwenChat(replace(drawn.config, seed=4))
    assert other.answer([question]) != drawn.answer([question])


def test_one_bad_case_is_its_own_error(greedy):
    writer = QwenTextGenerator(greedy, REFLECTION)
    broken = replace(CASES[0], image=picture(1, 400)), replace(CASES[1], evaluation="word " * 5000)
    written = writer.write([CASES[0], *broken, CASES[2]])
    assert [one.text for one in (written[0], written[3])] == [one.text for one in writer.write([CASES[0], CASES[2]])]
    assert [one.text for one in written[1:3]] == [None, None]
    assert "at most 200 times" in (written[1].error or "")
    assert "the model reads" in (written[2].error or "")
    assert writer.write([]) == []


HISTORY = (PastImage(picture(60, 90), "", "too dark"), PastImage(picture(90, 60), "Lighten it.", "too light"))
CHAINS = (CASES[0], replace(CASES[1], history=HISTORY[:1]), replace(CASES[2], history=HISTORY), CASES[2])


def test_earlier_images_come_first_each_behind_its_text(greedy, monkeypatch):
    asked = []
    monkeypatch.setattr(greedy, "answer", lambda questions: asked.extend(questions) or ["x"] * len(questions))
    QwenTextGenerator(greedy, REFLECTION).write(CHAINS)
    parts = asked[2].parts
    assert [type(part) is str for part in parts] == [True, False] * 3
    assert list(parts[1::2]) == [HISTORY[0].image, HISTORY[1].image, CASES[2].image]
    assert parts[0].startswith(
        "Earlier attempt 1 of 2, painted after this reflection: none\nFindings about it:\ntoo dark"
    )
    assert parts[2].startswith("Earlier attempt 2 of 2, painted after this reflection: Lighten it.\n")
    assert parts[4].startswith("The picture to correct.")
    assert [len(question.parts) for question in asked] == [2, 4, 6, 2]


@pytest.mark.parametrize("own", ["reflection_generator", str(PROMPTS / "reflection_generator.md")])
def test_the_published_reflection_generator_is_asked_as_it_was_trained(greedy, monkeypatch, own):
    """Its system message, then the image, then one instruction that ends in the quoted prompt."""
    asked = []
    monkeypatch.setattr(greedy, "answer", lambda questions: asked.extend(questions) or ["x"] * len(questions))
    QwenTextGenerator(greedy, REFLECTION, own).write(CASES)
    assert [question.instructions for question in asked] == ["You are a helpful assistant."] * 3
    for question, case in zip(asked, CASES, strict=True):
        image, text = question.parts
        assert image is case.image
        assert text.endswith(f': "{case.prompt}"')
        assert "$" not in text


@pytest.mark.parametrize(("text", "first"), [("$image Why?", True), ("Why?\n$image", False), ("Why?", False)])
def test_where_a_prompt_file_puts_the_image(greedy, monkeypatch, tmp_path, text, first):
    asked = []
    monkeypatch.setattr(greedy, "answer", lambda questions: asked.extend(questions) or ["x"] * len(questions))
    (tmp_path / "own.md").write_text(f"Be brief.\n---\nBefore: $image\n---\n{text}\n")
    QwenTextGenerator(greedy, REFLECTION, tmp_path / "own.md").write(CHAINS[1:2])
    past, now = (HISTORY[0].image, CASES[1].image)
    assert asked[0].parts == ("Before:", past, *((now, "Why?") if first else ("Why?", now)))


@pytest.mark.parametrize("text", ["Look at $image here.", "$image what? $image", "$image ${image}"])
def test_an_image_in_the_middle_of_a_text_is_refused(greedy, tmp_path, text):
    (tmp_path / "own.md").write_text(f"Be brief.\n---\n{text}\n")
    with pytest.raises(InputError, match=r"own\.md: \$image must stand once, at the beginning or the end"):
        QwenTextGenerator(greedy, REFLECTION, tmp_path / "own.md")


def test_a_generator_in_a_folder_of_the_hub(golden, greedy, monkeypatch, tmp_path):
    """As it is published: in a sub-folder, beside what training leaves."""
    served = tmp_path / "served" / "infer" / "30000"
    served.parent.mkdir(parents=True)
    served.symlink_to(golden / "qwen" / "base")
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(monkeypatch, tmp_path / "cache", {"diffusion-cot/Reflection-Generator": tmp_path / "served"})
    monkeypatch.setattr(hub, "files", lambda *_, **__: [f"infer/30000/{p.name}" for p in served.iterdir()])
    section = {"dtype": "float32", "batch_size": 4, "max_new_tokens": 8, "prompt_file": "reflection_generator"}
    config = QwenTextGeneratorConfig("diffusion-cot/Reflection-Generator/infer/30000", **section)
    writer = make_text_generator(config, REFLECTION)
    assert writer.name == "qwen Reflection-Generator/infer/30000"
    want = QwenTextGenerator(greedy, REFLECTION, "reflection_generator").write(CASES)
    assert writer.write(CASES) == want


def test_texts_with_a_history_depend_on_their_case_alone(greedy):
    """Cases with more and with fewer pictures share a batch."""
    writer = QwenTextGenerator(greedy, REFLECTION)
    want = [written.text for written in writer.write(CHAINS)]
    assert all(want)
    assert want[2] != want[3]
    assert [writer.write([case])[0].text for case in CHAINS] == want
    assert [written.text for written in writer.write(CHAINS[::-1])][::-1] == want


def test_a_prompt_file_without_a_part_about_earlier_images_takes_the_shipped_one(greedy, tmp_path, monkeypatch):
    (tmp_path / "own.md").write_text("Be brief.\n---\nWhat now, $prompt?")
    asked = []
    monkeypatch.setattr(greedy, "answer", lambda questions: asked.extend(questions) or ["x"] * len(questions))
    QwenTextGenerator(greedy, REFLECTION, tmp_path / "own.md").write(CHAINS[1:2])
    assert asked[0].instructions == "Be brief."
    assert asked[0].parts[0].startswith("Earlier attempt 1 of 1")
    assert asked[0].parts[2] == "What now, two clocks?"


def test_texts_are_cleaned():
    assert _written(' "Add a\n clock." ').text == "Add a clock."
    assert _written("  \n").error == "the answer is empty"
    assert _written(InputError("why")).error == "why"


def test_texts_without_pictures(greedy):
    """A batch of text alone, and one with several pictures in a question."""
    (text,) = greedy.answer([ChatQuery(None, ("Say something.",))])
    several, again = greedy.answer(
        [ChatQuery(None, ("Compare", picture(60, 60), picture(90, 40))), ChatQuery(None, ("Hi",))]
    )
    assert all(isinstance(answer, str) and answer for answer in (text, several, again))


def test_what_is_not_usable(tmp_path, greedy, config):
    (tmp_path / "prompt.md").write_text("no divider")
    with pytest.raises(InputError, match="a line --- must divide"):
        QwenTextGenerator(greedy, REFLECTION, tmp_path / "prompt.md")
    with pytest.raises(InputError, match="cannot read the prompt file"):
        QwenTextGenerator(greedy, REFLECTION, tmp_path / "none.md")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        QwenChat(replace(config, model=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_pixels": 0}, "max_pixels is 0"),
    ],
)
def test_options_are_checked_before_a_model_is_looked_for(config, change, message):
    with pytest.raises(InputError, match=message):
        replace(config, model="/nowhere", **change)


def folder_saying(golden, folder, generation):
    """A copy of the model's folder without its weights, with another ``generation_config.json``."""
    for file in (golden / "qwen" / "base").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("generation", "change", "message"),
    [
        ({}, {"max_new_tokens": 5000}, "max_new_tokens is 5000; .* reads 4096 tokens"),
        ({"eos_token_id": "a"}, {}, r"generation_config\.json: eos_token_id is 'a'"),
        ({"eos_token_id": ["a"]}, {}, r"generation_config\.json: eos_token_id is \['a'\]"),
        ({"repetition_penalty": "x"}, {}, r"generation_config\.json: repetition_penalty is 'x'"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_read(golden, tmp_path, config, generation, change, message):
    folder = folder_saying(golden, tmp_path, generation)  # which has no weights
    with pytest.raises(InputError, match=message):
        QwenChat(replace(config, model=str(folder), **change))


def test_a_repetition_penalty_is_the_files_or_the_options(golden, tmp_path, config, caplog):
    folder = folder_saying(golden, tmp_path, {"repetition_penalty": 1.05, "do_sample": True, "num_beams": 1})
    assert repetition_penalty(folder) == 1.05
    assert not caplog.records
    assert decoding_of(config, 1.05, eos=(), pad=0).repetition_penalty == 1.05
    own = replace(config, repetition_penalty=1.0)
    assert decoding_of(own, 1.05, eos=(), pad=0).repetition_penalty == 1
    folder_saying(golden, tmp_path, {"no_repeat_ngram_size": 3, "num_beams": 4})
    assert repetition_penalty(folder) == 1
    assert "num_beams 4, no_repeat_ngram_size 3 is not followed here" in caplog.text


def test_penalised_texts_depend_on_their_case_alone(greedy, config):
    """Padding and neighbours do not count as repeated; the question and the answer do."""
    penalised = QwenChat(replace(config, repetition_penalty=1.6))
    writer = QwenTextGenerator(penalised, REFLECTION)
    want = [written.text for written in writer.write(CASES)]
    assert want != [written.text for written in QwenTextGenerator(greedy, REFLECTION).write(CASES)]
    assert [writer.write([case])[0].text for case in CASES] == want


def test_only_tokens_before_the_padding_are_penalised():
    ids, lengths = jnp.asarray([[1, 3, 4], [2, 2, 2]]), jnp.asarray([2, 3])
    prompts = Prompts(jnp.zeros((2, 3, 1)), lengths, lengths, lengths, lengths > 0, ids=ids)
    seen = _tokens_of(prompts, 5)
    np.testing.assert_array_equal(seen, [[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]])
    logits = jnp.asarray([[1.0, 2.0, -1.0, -2.0, 4.0], [0.0, 1.0, 0.0, 1.0, 1.0]])
    want = [[1.0, 1.0, -1.0, -4.0, 4.0], [0.0, 1.0, 0.0, 1.0, 1.0]]
    np.testing.assert_array_equal(penalised(logits, seen, 2.0), want)
