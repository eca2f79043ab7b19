"""Fine-tuning on chats: which tokens are learned, over which meshes, and what is said of chats that are not usable."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from rflow_jax.commands.dataset import ChatsConfig, make_chats
from rflow_jax.data.sources.chats import ChatFile
from rflow_jax.errors import InputError
from rflow_jax.parallel.mesh import MeshConfig
from rflow_jax.testing.make_genref import make_genref
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.training.qwen.config import QwenLoraConfig
from rflow_jax.training.sft.config import ChatDataConfig, ChatValidationConfig
from rflow_jax.weights.lora.peft import attach_adapter
from rflow_jax.weights.qwen import load_qwen, published_table
from tests.kit import chats as kit
from tests.kit.sft import BASE, SftRun, sft_config


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return kit.make_chats(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def plain(chats) -> SftRun:
    return SftRun(sft_config(chats))


@pytest.fixture(scope="module")
def losses(plain) -> np.ndarray:
    return plain.losses()


@pytest.mark.parametrize(
    ("mesh", "devices", "train"),
    [
        (MeshConfig(), 1, {"remat": "full", "gradient_accumulation_steps": 4}),
        (MeshConfig(data=1, fsdp=2, tensor=2), 4, {"gradient_accumulation_steps": 2}),
    ],
    ids=["in parts", "fsdp x tensor in parts"],
)
def test_losses_and_gradients_are_those_of_one_device(chats, losses, mesh, devices, train):
    """Also in parts with unlike numbers of tokens to be predicted."""
    run = SftRun(sft_config(chats, mesh=mesh, train=train), devices)
    np.testing.assert_allclose(run.losses(), losses, rtol=1e-4)


def test_answers_and_the_tokens_that_end_them_are_learned(plain):
    tokenizer = QwenTokenizer(BASE)
    maker, source = plain.task._maker, plain.task._source
    for index, turns in enumerate(kit.TURNS):
        example = maker.example(source.read(index))
        text = tokenizer._tokenizer.decode(example.sample.ids[example.learned])
        assert text == "".join(f"{said}<|im_end|>" for role, said in turns if role == "assistant")
        # What is not learned is what the model is shown when it is asked.
        question = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Say something."}]))
        if len(turns) == 2 and "<image>" not in turns[0][1]:
            np.testing.assert_array_equal(example.sample.ids[~example.learned], question)


def test_validation_counts_every_token_once(chats, plain, losses, tmp_path):
    """Whatever the size of its batches."""
    tried = []
    for batch in (4, 3):
        config = sft_config(chats, batch=batch, validation=ChatValidationConfig(chats=str(chats)))
        run = SftRun(config)
        validation = run.task.open_validation(tmp_path)
        assert validation is not None
        with jax.default_matmul_precision("highest"):
            tried.append(validation.run(0, run.state.trainable))
    assert tried[0] == pytest.approx(tried[1], rel=1e-5)
    # All four chats are the first batch of the training too.
    assert tried[0]["validation/loss"] == pytest.approx(losses[0, 0], rel=1e-5)


def test_chats_that_do_not_fit_are_replaced_and_counted(chats, tmp_path):
    records = [json.loads(line) for line in chats.read_text().splitlines()]
    long = {"messages": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "no"}]}
    many = {"messages": [{"role": "user", "content": "<image>" * 3}, {"role": "assistant", "content": "no"}]}
    many["images"] = records[0]["images"] * 3
    gone = {"messages": records[0]["messages"], "images": ["gone.png"]}
    token = {"messages": [{"role": "user", "content": "<|image_pad|>"}, {"role": "assistant", "content": "no"}]}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [long, many, gone, token, *records]))
    for picture in chats.parent.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    run = SftRun(sft_config(tmp_path / "chats.jsonl", batch=8))
    with run.task.open_loader(0, None) as loader:
        skipped = next(iter(loader)).skipped
    for words in (
        "chats.jsonl:1: ",
        "more than data.max_tokens",
        "more than data.max_images (2)",
        "chats.jsonl:3: ",
        "cannot read this picture",
        "<|image_pad|>",
    ):
        assert any(words in reason for reason in skipped), (words, skipped)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "messages is None"),
        ({"messages": [{"role": "user", "content": "a"}]}, "nothing to learn"),
        ({"messages": [{"role": "human", "content": "a"}]}, "role is 'human'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "is not a message"),
        (
            {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]},
            "<image> occurs 1 times in the messages, for 0 images",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}], "images": "a.png"}, "give a list of files"),
    ],
)
def test_a_line_that_is_not_usable_is_named(tmp_path, record, message):
    (tmp_path / "chats.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"chats\.jsonl:1: .*" + message):
        ChatFile.open(tmp_path / "chats.jsonl")


def test_reflections_of_genref_as_chats(tmp_path):
    make_genref(tmp_path / "genref", shards=2, samples=8)
    shards = str(tmp_path / "genref")
    assert make_chats(ChatsConfig(shards, str(tmp_path / "out"), held_out=4, limit=10)) == (6, 4)
    source = ChatFile.open(tmp_path / "out" / "chats.jsonl")
    chat = source.read(0)
    assert len(source) == 6
    assert [role for role, _ in chat.messages] == ["user", "assistant"]
    assert chat.messages[1][1].endswith(".")
    assert chat.images[0].startswith(b"\xff\xd8")
    held_out = ChatFile.open(tmp_path / "out" / "held_out.jsonl")
    names = [line.images[0] for line in held_out.lines]
    assert names == [f"pictures/{k:07d}.jpg" for k in (1, 3, 6, 8)]  # from all over the ten
    with pytest.raises(InputError, match="are held out"):
        make_chats(ChatsConfig(shards, str(tmp_path / "other"), held_out=16))
    with pytest.raises(InputError, match="must contain <image> once"):
        ChatsConfig(shards, "out", question="Prompt: $prompt")


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("limit", -1), ("held_out", -1)])
def test_how_many_chats_are_made(name, value):
    with pytest.raises(InputError, match=f"^{name} is {value}: give a whole number from"):
        ChatsConfig("shards", "out", **{name: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, "use_dora is not supported"),
        ({"r": 4, "lora_alpha": 8, "peft_type": "IA3"}, "peft_type IA3 is not supported"),
        ({"r": 4}, "no r and lora_alpha"),
        ({"r": 4, "lora_alpha": 8}, "adapter_model"),
    ],
)
def test_adapters_that_cannot_be_used(tmp_path, config, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = load_qwen(BASE, dtype=np.float32)
    with pytest.raises(InputError, match=message):
        attach_adapter(model, tmp_path, published_table(model))


def test_settings_that_make_no_sense():
    with pytest.raises(InputError, match=r"data\.chats"):
        ChatDataConfig()
    with pytest.raises(InputError, match=r"validation\.every"):
        ChatValidationConfig(every=0)
    with pytest.raises(InputError, match="not a regular expression"):
        QwenLoraConfig(target_modules="(")
    with pytest.raises(InputError, match=r"^trainable_parameters: not a regular expression"):
        sft_config("c", trainable_parameters="(")
