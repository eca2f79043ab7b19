"""Reward training: what moves, over which meshes, what is exported, and what is said of data that is not usable."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from rflow_jax.data.records import RecordError
from rflow_jax.data.sources.preferences import INVALID, TIE, A, B, PairFile
from rflow_jax.errors import InputError
from rflow_jax.parallel.mesh import MeshConfig
from rflow_jax.training.checkpoints import Checkpoints
from rflow_jax.training.config import CheckpointConfig
from rflow_jax.training.partition import dotted
from rflow_jax.training.qwen.config import QwenLoraConfig
from rflow_jax.training.reward.config import PairDataConfig, PairValidationConfig, RewardRunConfig, RewardTaskConfig
from rflow_jax.training.reward.task import Reward, open_checked
from rflow_jax.verifiers.config import RewardVerifierConfig
from rflow_jax.verifiers.reward import RewardVerifier
from rflow_jax.weights.reward_config import SPECIAL_TOKEN
from tests.kit.preferences import make_pairs
from tests.kit.reward import RewardRun, reward_config


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"), 24)


@pytest.fixture(scope="module")
def plain(pairs) -> np.ndarray:
    return RewardRun(reward_config(pairs)).losses()


@pytest.mark.parametrize(
    ("mesh", "devices", "train"),
    [
        (MeshConfig(), 1, {"remat": "full", "gradient_accumulation_steps": 4}),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, {"gradient_accumulation_steps": 2}),
    ],
    ids=["in parts", "data x fsdp x tensor in parts"],
)
def test_losses_and_gradients_are_those_of_one_device(pairs, plain, mesh, devices, train):
    run = RewardRun(reward_config(pairs, mesh=mesh, train=train), devices)
    np.testing.assert_allclose(run.losses(), plain, rtol=1e-4)


def test_only_the_lora_the_head_and_the_special_tokens_vector_move(pairs):
    run = RewardRun(reward_config(pairs))
    paths = {dotted(path) for path, _ in nnx.to_flat_state(run.state.trainable)}
    others = {path for path in paths if ".lora_" not in path}
    assert others == {"reward.kernel", "language.embed.special"}
    assert all(path.startswith("language.blocks.") for path in paths - others)
    # No optimizer state of the size of the table.
    rows = run.task.exporter.parts.frozen["language"]["embed"]["embedding"].get_value().shape[0]
    assert not any(rows in leaf.shape for leaf in jax.tree.leaves(run.state))
    before = jax.device_get(run.state.trainable)
    run.losses(2)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(run.state.trainable))
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
    ("lora", "parameters", "task"),
    [
        (QwenLoraConfig(rank=4, alpha=8.0), None, RewardTaskConfig(normalise=True)),
        (QwenLoraConfig(rank=2, alpha=None), r"vision\..*|language\.embed\.embedding", None),
        (
            QwenLoraConfig(target_modules=r"vision\.blocks\.0\.ff\.up|language\.blocks\.1\.attn\.q", rank=3),
            None,
            RewardTaskConfig(token="last", mrope=True, loss="btt"),
        ),
    ],
    ids=["lora", "vision tower and embedding", "last token"],
)
def test_the_verifier_gives_the_scores_of_the_trained_model(pairs, tmp_path, lora, parameters, task):
    task = task or RewardTaskConfig()
    held_out = PairValidationConfig(pairs=str(pairs), records=6)
    how = {"lora": lora, "trainable_parameters": parameters, "reward": task, "validation": held_out}
    run = RewardRun(reward_config(pairs, **how))
    validation = run.task.open_validation(tmp_path)
    assert validation is not None
    run.losses(2)
    with jax.default_matmul_precision("highest"):
        want = validation.rewards(run.state.trainable)
        assert validation.rewards(run.state.trainable) is want  # an export of the same step computes nothing again
        kept = Checkpoints(tmp_path, CheckpointConfig())
        kept.save(run.state, {}, {}, run.task.exporter)
        kept.close()
        lines = [json.loads(line) for line in pairs.read_text().splitlines()[:6]]
        shown = [(line, Image.open(pairs.parent / line[name])) for line in lines for name in ("image_a", "image_b")]
        assert np.ptp(want) > 1e-2
        for merge_lora in (True, False):
            how = {"dtype": "float32", "merge_lora": merge_lora, "mrope": task.mrope, "batch_size": 4}
            verifier = RewardVerifier(RewardVerifierConfig(str(tmp_path / "reward"), **how))
            verdicts = verifier.score([image for _, image in shown], [line for line, _ in shown])
            np.testing.assert_allclose([one.raw[0] for one in verdicts], want.ravel(), atol=2e-5)
            if task.normalise:
                scores = np.asarray([one.score for one in verdicts])
                np.testing.assert_allclose([scores.mean(), scores.std()], [0, 1], atol=1e-4)


def test_the_wording_goes_with_the_export(pairs, tmp_path):
    (tmp_path / "wording.txt").write_text("How well does it show $prompt?")
    how = RewardTaskConfig(prompt_file=str(tmp_path / "wording.txt"))
    run = RewardRun(reward_config(pairs, reward=how))
    run.task.exporter.export(run.state.trainable, tmp_path / "reward" / "checkpoint-0")
    verifier = RewardVerifier(RewardVerifierConfig(str(tmp_path / "reward"), dtype="float32"))
    assert verifier._template.template == f"How well does it show $prompt? {SPECIAL_TOKEN}"


def test_exports_that_go_with_their_checkpoints(pairs, tmp_path):
    run = RewardRun(reward_config(pairs))
    kept = Checkpoints(tmp_path, CheckpointConfig(keep_last=1))
    for _ in range(2):
        run.losses(1)
        kept.save(run.state, {}, {}, run.task.exporter)
    kept.close()
    # The first checkpoint is there until the second is whole.
    found = {path.name for path in (tmp_path / "reward").iterdir()}
    assert found - {"checkpoint-1"} == {"model_config.json", "checkpoint-2"}


def test_a_qkv_linear_of_the_tower_can_have_no_lora(pairs):
    with pytest.raises(InputError, match="query, key and value of the vision tower"):
        RewardRun(reward_config(pairs, lora=QwenLoraConfig(target_modules=r"vision\.blocks\.0\.attn\.q")))


@pytest.mark.parametrize("loss", ["scaled", "reg"])
def test_losses_by_scores_need_scores(tmp_path, loss):
    config = reward_config(make_pairs(tmp_path, 4, score_a=None, score_b=None), reward=RewardTaskConfig(loss=loss))
    with pytest.raises(InputError, match="it takes people's scores"):
        RewardRun(config)


def test_pictures_that_cannot_be_decoded_are_replaced_and_counted(tmp_path):
    file = make_pairs(tmp_path, 8)
    broken = sorted(tmp_path.glob("*_good.jpg"))[:2]
    broken[0].write_bytes(b"no picture")
    broken[1].unlink()
    task = Reward(reward_config(file, batch=8), RewardRun(reward_config(file)).task._mesh)
    with task.open_loader(0, None) as loader:
        batch = next(iter(loader))
    assert sorted(reason.partition(": ")[0].partition("jsonl:")[0] for reason in batch.skipped)
    assert len(batch.skipped) >= 2
    assert any("cannot be decoded" in reason for reason in batch.skipped)
    assert any("cannot read this picture" in reason for reason in batch.skipped)
    config = reward_config(file)
    strict = replace(config, data=replace(config.data, skip_limit=1))
    task = Reward(strict, task._mesh)
    with task.open_loader(0, None) as loader, pytest.raises(InputError, match=r"data\.skip_limit \(1\)"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("word " * 200, "too long: 852 tokens, the model reads 64"), (f"a {SPECIAL_TOKEN}", "contains the special token")],
    ids=["long", "special token"],
)
def test_prompts_that_do_not_fit_are_skipped(pairs, tmp_path, prompt, reason):
    lines = pairs.read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join([json.dumps(json.loads(lines[0]) | {"prompt": prompt}), *lines[1:4]])
    )
    for picture in pairs.parent.glob("*.jpg"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    run = RewardRun(reward_config(tmp_path / "pairs.jsonl", batch=4))
    with run.task.open_loader(0, None) as loader:
        (skipped,) = next(iter(loader)).skipped
    assert reason in skipped
    assert "pairs.jsonl:1" in skipped


def test_the_order_follows_from_seed_and_step_alone(pairs):
    task = RewardRun(reward_config(pairs)).task
    with task.open_loader(0, None) as loader:
        batches = iter(loader)
        digests = [next(batches).digest for _ in range(5)]
    with task.open_loader(3, loader.position(3)) as later:
        batches = iter(later)
        assert [next(batches).digest for _ in range(2)] == digests[3:]
    assert len(set(digests)) == 5
    with pytest.raises(InputError, match="not the records the run began with"):
        task.open_loader(3, {"fingerprint": "another"})


def test_labels_and_scores(tmp_path, caplog):
    labels = ["A", "B", "same", "C", None, 3]
    lines = [{"prompt": "p", "image_a": "a", "image_b": "b", "label": label} for label in labels]
    lines.append({"prompt": "p", "image_a": "a", "image_b": "b", "score_a": 4})
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    with caplog.at_level(logging.WARNING):
        source = PairFile.open(tmp_path / "pairs.jsonl")
    assert [line.label for line in source.lines] == [A, B, TIE, *[INVALID] * 4]
    assert source.lines[-1].scores == (4.0, 0.0)
    assert source.has_scores
    assert "4 of 7 lines have no label" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "p"', r"pairs\.jsonl:2: not a JSON object \("),
        ("[1]", r"pairs\.jsonl:2: not a JSON object"),
        ('{"image_a": "a", "image_b": "b", "label": "A"}', r"pairs\.jsonl:2: prompt is None"),
        ('{"prompt": "p", "image_a": 3, "image_b": "b"}', r"pairs\.jsonl:2: image_a is 3"),
        ('{"prompt": "p", "image_a": "a", "image_b": "b", "score_a": "high"}', r"pairs\.jsonl:2: score_a is 'high'"),
        ('{"prompt": "p", "image_a": "a", "image_b": "b", "score_b": NaN}', r"pairs\.jsonl:2: .*NaN is no number"),
    ],
)
def test_a_line_that_is_not_usable_is_named(tmp_path, content, message):
    good = '{"prompt": "p", "image_a": "a", "image_b": "b", "label": "A"}'
    (tmp_path / "pairs.jsonl").write_text(f"{good}\n{content}\n")
    with pytest.raises(InputError, match=message):
        PairFile.open(tmp_path / "pairs.jsonl")


def test_a_file_without_a_line(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(InputError, match="file of pairs is empty"):
        PairFile.open(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(
    ("loss", "more", "message"),
    [
        ("bt", {}, "no line with a label A or B"),
        ("bt", {"label": "same"}, "no line with a label A or B"),
        ("btt", {"label": "same"}, None),
        ("btt", {"score_a": 3}, "no line with a label A, B or same"),
        ("reg", {"score_a": 3}, None),
        ("reg", {"label": "A"}, "takes people's scores"),
        ("scaled", {"score_a": 3, "label": "same"}, "no line with a label A or B"),
    ],
)
def test_a_file_must_teach_something_by_the_loss(tmp_path, loss, more, message):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "p", "image_a": "a", "image_b": "b"} | more))
    config = RewardRunConfig(
        model="m", out="o", data=PairDataConfig(pairs=str(file)), reward=RewardTaskConfig(loss=loss)
    )
    with pytest.raises(InputError, match=message) if message else nullcontext():
        open_checked(config, str(file), None)


def test_texts_may_hold_separators_of_lines_and_no_half_characters(tmp_path):
    file = tmp_path / "pairs.jsonl"
    prompt = "one\u2028two\u0085three"
    line = {"prompt": prompt, "image_a": "a", "image_b": "b", "label": "A"}
    file.write_text("\ufeff" + json.dumps(line, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert PairFile.open(file).lines[0].prompt == prompt
    file.write_text(json.dumps(line | {"prompt": "half \ud83d"}))
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: contains an unpaired surrogate"):
        PairFile.open(file)
    file.write_text(json.dumps(line | {"image_a": "a\0.png"}))
    with pytest.raises(RecordError, match="cannot read this picture"):
        PairFile.open(file).read(0)


def test_settings_that_make_no_sense():
    with pytest.raises(InputError, match="give pairs"):
        PairDataConfig()
    with pytest.raises(InputError, match=r"reward\.normalise"):
        RewardRunConfig(model="m", out="o", data=PairDataConfig(pairs="p"), reward=RewardTaskConfig(normalise=True))
    with pytest.raises(InputError, match="give one of them"):
        reward_config("p", lora=QwenLoraConfig(target_modules=None))
    with pytest.raises(InputError, match=r"data\.max_ratio"):
        PairDataConfig(pairs="p", max_ratio=0.5)
