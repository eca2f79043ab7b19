"""The small Qwen2.5-VL of the shapes world: its words, its sizes, its files."""

from random import Random

import numpy as np
import pytest
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.shapes.edits import reflection, repair, spoil
from rflow_jax.shapes.grammar import COLORS, SHAPES, all_contents, sample_prompt
from rflow_jax.shapes.requirements import requirements
from rflow_jax.shapes.scenes import make_scene
from rflow_jax.shapes.vision_language import CONTEXT, sizes, tokenizer, write_start
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vlm") / "start"
    assert write_start(path) == 1_017_280
    return path


def test_a_word_is_a_token():
    known, rng = tokenizer(), Random(0)
    for _ in range(100):
        prompt = sample_prompt(rng)
        edits, _ = repair(prompt, spoil(make_scene(prompt, rng), prompt, rng))
        texts = [reflection(edits), *(part.question for part in requirements(prompt)), prompt.text]
        for text in texts:
            tokens = known.encode(text).tokens
            assert len(tokens) == len(text.replace(".", " .").replace("?", " ?").replace(",", " ,").split()), text
            assert known.decode(known.encode(text).ids) == text


def test_yes_and_no_are_tokens():
    known = tokenizer()
    assert [known.encode(word).tokens for word in ("yes", "no")] == [["yes"], ["no"]]


def test_a_picture_is_36_tokens(folder):
    chat = QwenChat(QwenChatConfig(str(folder), dtype="float32", max_new_tokens=2))
    image = Image.new("RGB", (96, 96), "white")
    questions = [one.question for prompt in all_contents("counting") for one in requirements(prompt)]
    samples = [chat._prepared(ChatQuery(None, (image, question)))[0] for question in questions[:4]]
    assert {int((sample.ids == sizes().image_token_id).sum()) for sample in samples} == {36}
    assert max(len(sample.ids) for sample in samples) < CONTEXT / 4
    assert len(chat.answer([ChatQuery(None, (image, questions[0]))])) == 1


def test_transformers_reads_the_tokenizer(folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), tokenizer()
    for text in ("Is the red star left of the ring?", f"Make the {SHAPES[0]} {next(iter(COLORS))}.", "Ünknown 12"):
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.eos_token_id == ours.token_to_id("<|im_end|>")


def test_seeds_are_different_models(tmp_path, folder):
    write_start(tmp_path / "again")
    write_start(tmp_path / "other", seed=1)
    files = [path / "model.safetensors" for path in (folder, tmp_path / "again", tmp_path / "other")]
    first, again, other = (np.frombuffer(file.read_bytes(), np.uint8) for file in files)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    with pytest.raises(InputError, match="again"):
        write_start(tmp_path / "again")
