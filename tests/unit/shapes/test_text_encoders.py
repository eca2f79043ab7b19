"""Training of the shapes world's text encoders: what texts say, steps, resumed runs, and what is exported."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.generation.pipeline import load_pipeline
from rflow_jax.parallel.layout import MeshConfig
from rflow_jax.parallel.mesh import make_mesh
from rflow_jax.shapes.edits import Edit
from rflow_jax.shapes.grammar import TAGS, Prompt, Wanted, all_contents, is_held_out, parse
from rflow_jax.shapes.model import DEFAULTS, new_network, save_pipeline, sizes, write_start
from rflow_jax.shapes.text_config import (
    ShapesTextRunConfig,
    TextDataConfig,
    TextLoopConfig,
    TextValidationConfig,
)
from rflow_jax.shapes.text_encoders import ShapesText
from rflow_jax.shapes.text_table import (
    HEADS,
    OWN_HEADS,
    PROMPT_HEADS,
    Text,
    TextCoder,
    TextMaker,
    TextTable,
    make_text_table,
    nouns_of,
    sample_text,
)
from rflow_jax.shapes.vocabulary import CLIP_LENGTH, T5_LENGTH
from rflow_jax.tokenizers.flux import Tokenizers
from rflow_jax.training.config import CheckpointConfig, LoggingConfig, OptimizerConfig
from rflow_jax.training.loop import train
from rflow_jax.verifiers.findings import KEEP
from rflow_jax.weights.components import CLIP, T5
from rflow_jax.weights.loading import parameter_values
from tests.kit.task_run import TaskRun

MIX: dict[str, Any] = {"reflected": 0.6, "kept": 0.2, "uniform": 0.5}
SMALL_T5 = {"num_layers": 1, "d_ff": 64}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model whose T5 is smaller still."""
    root = tmp_path_factory.mktemp("shapes")
    write_start(root / "start")
    t5 = new_network(T5, replace(sizes()[T5.folder], **SMALL_T5), seed=0)
    save_pipeline(root / "small", {T5.folder: t5}, base=root / "start", changes={T5.folder: SMALL_T5})
    return root / "small"


def config_of(start: Path, out: Path | str = "unused", **how: Any) -> ShapesTextRunConfig:
    loop = {"steps": 4, "batch_size": 8} | how.pop("train", {})
    whole = {
        "data": TextDataConfig(texts=16, workers=0),
        "train": TextLoopConfig(**loop),
        "optimizer": OptimizerConfig("adamw", lr=5e-3, max_grad_norm=1.0, weight_decay=0.0, betas=(0.9, 0.99)),
        "validation": TextValidationConfig(texts=5, every=4),
        "checkpoint": CheckpointConfig(every=2, keep_last=2),
        "logging": LoggingConfig(tensorboard=False),
    }
    return ShapesTextRunConfig(model=str(start), out=str(out), **whole | how)


class Steps(TaskRun):
    """Tells losses and norms of the gradients."""

    def __init__(self, config: ShapesTextRunConfig, devices: int = 1):
        super().__init__(ShapesText, config, devices, lambda report: ())


@pytest.fixture(scope="module")
def plain(start) -> Steps:
    return Steps(config_of(start))


@pytest.fixture(scope="module")
def losses(plain) -> np.ndarray:
    return plain.losses(30)


def prompt_of(targets: list[int]) -> Prompt:
    """The inverse of a prompt's targets."""
    *nouns, relation, count = (head[i] for head, i in zip(PROMPT_HEADS, targets, strict=False))
    wanted = [Wanted(str(shape), str(color)) for color, shape in zip(nouns[::2], nouns[1::2], strict=True) if shape]
    return Prompt((replace(wanted[0], count=int(count)), *wanted[1:]), str(relation))


def sentences_of(targets: list[int]) -> list[str]:
    """The orders that the targets of a text's reflection stand for."""
    content = [head[i] for head, i in zip(HEADS, targets, strict=True)][len(PROMPT_HEADS) :]
    found = []
    for action, color, shape, to_color, to_shape, relation, count in (content[:7], content[7:]):
        if action == "keep":
            found.append(KEEP)
        elif action:
            noun, to = (f"{one} {other}".strip() for one, other in ((color, shape), (to_color, to_shape)))
            found.append(Edit(str(action), noun, f"{relation} the {to}" if relation else to, int(count)).text)
    return found


def test_a_prompt_can_be_made_from_its_targets():
    rng = Random(0)
    for tag in TAGS:
        contents = list(all_contents(tag))
        for prompt in rng.sample(contents, min(len(contents), 100)):
            for wording in prompt.wordings():
                assert prompt_of(Text(wording).targets) == wording


def test_a_reflection_can_be_made_from_its_targets():
    for number in range(200):
        text = sample_text(0, number, **MIX)
        assert prompt_of(text.targets) == text.prompt
        assert text.t5 == " ".join(
            [text.prompt.text, *(["[Reflexion]"] if text.edits is not None else []), *sentences_of(text.targets)]
        )


def test_targets_follow_the_order_of_words():
    one, other = parse("a star left of a ring"), parse("a ring left of a star")
    assert Text(one).targets != Text(other).targets
    assert Text(one).targets != Text(one.wordings()[1]).targets
    assert Text(one).targets != Text(one, ()).targets


@pytest.mark.parametrize(("uniform", "some"), [(0.0, False), (1.0, True)])
def test_held_out_prompts_are_read_only_if_asked_for(uniform, some):
    texts = [sample_text(0, number, reflected=0.0, kept=0.0, uniform=uniform) for number in range(100)]
    assert any(is_held_out(text.prompt) for text in texts) == some


def test_a_table_depends_on_its_seed_alone(start, monkeypatch):
    coder = TextCoder(start, CLIP_LENGTH, T5_LENGTH)
    whole, few, others = (make_text_table(count, seed, coder, **MIX) for count, seed in ((30, 7), (20, 7), (20, 8)))
    monkeypatch.setattr("rflow_jax.shapes.text_table.CHUNK", 16)
    assert make_text_table(30, 7, coder, workers=0, **MIX).fingerprint == whole.fingerprint
    for part, all_of_it in zip(few, whole, strict=True):
        np.testing.assert_array_equal(part, all_of_it[:20])
    assert few.fingerprint != others.fingerprint


def test_what_makes_texts_can_be_sent_to_a_worker(start):
    maker = TextMaker(TextCoder(start, CLIP_LENGTH, T5_LENGTH), 7, **MIX)
    sent = pickle.loads(pickle.dumps(maker))
    assert TextTable(*sent(range(3))).fingerprint == TextTable(*maker(range(3))).fingerprint


def test_the_loss_falls(losses):
    assert np.isfinite(losses).all()
    assert losses[-1, 0] < 0.4 * losses[0, 0]


def test_losses_and_gradients_on_a_mesh_are_those_of_one_device(start, losses):
    run = Steps(config_of(start, mesh=MeshConfig(data=2, fsdp=2)), 4)
    np.testing.assert_allclose(run.losses(2), losses[:2], rtol=1e-4)


def test_a_stopped_and_resumed_run_equals_a_whole_one(start, losses, tmp_path, monkeypatch):
    monkeypatch.setattr("rflow_jax.training.loop.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    train(config_of(start, tmp_path, train={"steps": 2}))
    train(config_of(start, tmp_path, resume=True))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["drawn"] for line in steps] == [{"texts": 8 * (k + 1)} for k in range(4)]
    found = [[line["loss"], line["gradient_norm"]] for line in steps]
    np.testing.assert_allclose(found, losses[:4], rtol=1e-5)
    assert {line["step"] for line in lines if "validation/t5" in line} == {0, 2, 4}
    assert sorted(folder.name for folder in (tmp_path / "model").iterdir()) == ["2", "4"]
    check_export(start, tmp_path / "model" / "4")


def check_export(start: Path, folder: Path) -> None:
    """An export is a whole model, in which both text encoders are others and all else is the same."""
    before, after = (load_pipeline(str(one), dtype="float32", progress=False).bundle for one in (start, folder))
    for name, changed in (("clip", True), ("t5", True), ("vae", False)):
        pairs = zip(*(jax.tree.leaves(one.weights[name]) for one in (before, after)), strict=True)
        assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs) == changed


def test_a_run_goes_on_with_its_own_texts(plain):
    with plain.task.open_loader(0, None) as loader:
        position = loader.position(3)
    with pytest.raises(InputError, match="not the records the run began with"):
        plain.task.open_loader(3, position | {"fingerprint": "another"})


def test_validation_is_right_where_the_heads_are(plain, tmp_path):
    """Heads whose scores say what the first text says, whatever they read."""
    validation = plain.task.open_validation(tmp_path)
    assert validation is not None
    targets = np.asarray(validation._table.targets)
    network = jax.tree.map(np.asarray, plain.state.trainable)
    nothing = np.zeros(len(OWN_HEADS), targets.dtype)
    said = {"clip_heads": targets[0, : len(PROMPT_HEADS)], "t5_heads": np.concatenate([targets[0], nothing])}
    for name, classes in said.items():
        heads = network[name]
        heads["kernel"].set_value(np.zeros_like(heads["kernel"][...]))
        heads["bias"].set_value(np.eye(10, dtype=np.float32)[classes].reshape(-1))
    found = validation.run(0, network)
    same = np.all(targets[:5] == targets[0], axis=1).mean()
    assert 0 < same < 1
    assert found["validation/t5"] == pytest.approx(same)
    assert found["validation/t5_mean"] == pytest.approx(same)
    assert found["validation/clip"] >= same - 1e-6
    own = np.asarray(validation._table.own)[:5]
    assert found["validation/own"] == pytest.approx(np.all(own == 0, axis=-1).mean())


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("a photo of two stars", ["", "", "", "", " star"]),
        ("a photo of a red star and an", ["", "", "", "", "red star", "red star", "", ""]),
        ("a red star, a ring [Reflexion] Make the ring blue.", [
            "", "red star", "red star", "", "", " ring", "", "", "", " ring", "blue ", ""]),
        ("Remove one red thing.", ["", "", "red thing", "red thing", ""]),
    ],
)  # fmt: skip
def test_the_nouns_of_tokens(start, text, nouns):
    found = nouns_of(text)
    assert [" ".join(noun) if any(noun) else "" for noun in found] == nouns
    assert len(Tokenizers(start).t5([text], T5_LENGTH)[0].nonzero()[0]) == len(found) + 1  # and the end


def test_every_token_of_a_text_has_its_noun(start):
    """Texts of all kinds have one token a word."""
    texts = [sample_text(3, number, reflected=0.7, kept=0.1, uniform=0.5) for number in range(200)]
    table = TextCoder(start, CLIP_LENGTH, T5_LENGTH)(texts)
    np.testing.assert_array_equal([len(nouns_of(text.t5)) + 1 for text in texts], (table.t5_ids != 0).sum(1))


def test_no_validation_without_texts(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(plain.task, "_config", config_of(Path("unused"), validation=TextValidationConfig(texts=0)))
    assert plain.task.open_validation(tmp_path) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"train": {"remat": "full"}}, "train.remat is full"),
        ({"trainable_parameters": "t5.*"}, "trainable_parameters: all of both text encoders'"),
    ],
)
def test_settings_without_effect(how, message):
    with pytest.raises(InputError, match=message):
        config_of(Path("unused"), **how)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (TextDataConfig, {"texts": 0}, "data.texts is 0: give a whole number from 1"),
        (TextDataConfig, {"kept": 1.5}, "data.kept is 1.5: give a number from 0 to 1"),
        (TextValidationConfig, {"every": 0}, "validation.every is 0"),
    ],
)
def test_settings_that_cannot_be(section, value, message):
    with pytest.raises(InputError, match=message):
        section(**value)


def test_a_model_that_cannot_be_trained(start, plain, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        ShapesText(config_of(tmp_path / "none"), plain.mesh)
    short = DEFAULTS | {"max_sequence_length": 8}
    save_pipeline(tmp_path / "short", {}, base=start, defaults=short)
    with pytest.raises(InputError, match="takes 32 CLIP tokens and 8 T5 tokens"):
        ShapesText(config_of(tmp_path / "short"), plain.mesh)
    few = {"vocab_size": 20}
    clip = new_network(CLIP, replace(sizes()[CLIP.folder], **few), seed=0)
    assert parameter_values(clip)["embed.embedding"].shape[0] == 20
    save_pipeline(tmp_path / "few", {CLIP.folder: clip}, base=start, changes={CLIP.folder: few})
    with pytest.raises(InputError, match="has 20 tokens, its tokenizer gives"):
        ShapesText(config_of(tmp_path / "few"), plain.mesh)
