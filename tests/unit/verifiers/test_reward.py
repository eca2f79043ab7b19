"""The reward model as a verifier: scores that depend on nothing else, and errors for one image alone."""

from __future__ import annotations

import json
import logging
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rflow_jax.errors import InputError
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.config import RewardVerifierConfig
from rflow_jax.verifiers.reward import RewardVerifier, read_template
from rflow_jax.weights.convert import convert_qwen
from rflow_jax.weights.model_folder import ORBAX_FOLDER
from rflow_jax.weights.reward import RewardCheckpoint
from rflow_jax.weights.reward_config import SPECIAL_TOKEN, RewardConfig

PROMPTS = ("a photo of a bench", "two red apples on a small table, left of a cup", "x", "three clocks")
SIZES = ((170, 130), (90, 110), (64, 64), (200, 90))


def picture(width, height):
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def images():
    return [picture(*size) for size in SIZES]


@pytest.fixture(scope="module")
def items():
    return [{"prompt": prompt, "tag": "counting"} for prompt in PROMPTS]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """The recorded checkpoint, with numbers to normalise by."""
    root = tmp_path_factory.mktemp("reward")
    shutil.copytree(golden / "qwen" / "reward", root / "reward")
    (root / "base").symlink_to(golden / "qwen" / "base")
    config = json.loads((root / "reward" / "model_config.json").read_text())
    config["inference_config"] = {"VQ_mean": 0.25, "VQ_std": 0.5}
    (root / "reward" / "model_config.json").write_text(json.dumps(config))
    return root / "reward"


def verifier(folder, **how) -> RewardVerifier:
    return RewardVerifier(RewardVerifierConfig(str(folder), **{"dtype": "float32", "batch_size": 4} | how))


@pytest.fixture(scope="module")
def whole(folder) -> RewardVerifier:
    return verifier(folder)


def test_it_is_a_verifier(whole):
    assert isinstance(whole, Verifier)
    assert (whole.concurrency, whole.batch_size, whole.name) == (1, 4, "reward reward checkpoint-10")


def test_scores_depend_on_nothing_else(folder, whole, images, items):
    """The same alone, in another batch, in another order and at another padding; with the LoRA merged or apart."""
    want = [verdict.score for verdict in whole.score(images, items)]
    assert len({round(score, 3) for score in want}) == 4
    alone = verifier(folder, batch_size=1, merge_lora=False)
    assert [alone.score([i], [j])[0].score for i, j in zip(images, items, strict=True)] == pytest.approx(want, abs=1e-5)
    backwards = verifier(folder, batch_size=3).score(images[::-1], items[::-1])
    assert [verdict.score for verdict in backwards[::-1]] == pytest.approx(want, abs=1e-5)


def test_scores_are_normalised(whole, images, items):
    for verdict in whole.score(images[:2], items[:2]):
        assert verdict.score == pytest.approx((verdict.raw[0] - 0.25) / 0.5)
        assert verdict.scored


def test_multimodal_positions_are_another_score(folder, whole, images, items):
    plain, mrope = (one.score(images[:1], items[:1])[0].score for one in (whole, verifier(folder, mrope=True)))
    assert abs(plain - mrope) > 1e-3


def test_one_bad_image_is_its_own_error(whole, images, items, tmp_path):
    """Undecodable, without a prompt, too long, naming special tokens: the others keep their scores."""
    images[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-9000])
    cut = Image.open(tmp_path / "cut.png")
    given = [images[0], cut, images[1], images[2], images[3], images[0]]
    told = [items[0], items[0], {"tag": "x"}, {"prompt": "word " * 5000}, items[3], {"prompt": f"a {SPECIAL_TOKEN}"}]
    verdicts = whole.score(given, told)
    want = whole.score([images[0], images[3]], [items[0], items[3]])
    assert [verdict.scored for verdict in verdicts] == [True, False, False, False, True, False]
    assert [verdicts[k].score for k in (0, 4)] == pytest.approx([one.score for one in want], abs=1e-5)
    for verdict, reason in zip(
        [verdicts[k] for k in (1, 2, 3, 5)],
        ("cannot be decoded", "no prompt", "the model reads 4096", "contains the special token"),
        strict=True,
    ):
        assert reason in (verdict.error or "")


def test_a_score_that_is_no_number_is_its_own_error(whole, images, items, monkeypatch):
    import rflow_jax.verifiers.reward as module

    real = module.rewards

    def broken(*args):
        return real(*args).at[1].set(np.nan)

    monkeypatch.setattr(module, "rewards", broken)
    verdicts = whole.score(images, items)
    assert sum(verdict.scored for verdict in verdicts) == 3
    (failed,) = (verdict for verdict in verdicts if not verdict.scored)
    assert failed.error.startswith("the model's reward is not a number")


def test_nothing_to_score(whole):
    assert whole.score([], []) == []


def test_wordings(tmp_path, caplog):
    bare = read_template(RewardConfig("base"), None)
    assert bare.substitute(prompt="a cup") == "a cup"
    ours = read_template(RewardConfig("base", special_tokens=True), None)
    assert ours.substitute(prompt="a cup") == f"a cup {SPECIAL_TOKEN}"
    with caplog.at_level(logging.WARNING):
        worded = read_template(RewardConfig("base", special_tokens=True, template="detailed_special"), None)
    assert "'detailed_special'" in caplog.text
    assert worded.substitute(prompt="a cup").endswith(SPECIAL_TOKEN)
    (tmp_path / "own.txt").write_text(f"Rate $prompt: {SPECIAL_TOKEN}")
    own = read_template(RewardConfig("base", special_tokens=True), str(tmp_path / "own.txt"))
    assert own.substitute(prompt="it") == f"Rate it: {SPECIAL_TOKEN}"
    (tmp_path / "own.txt").write_text(f"{SPECIAL_TOKEN} Rate $prompt: {SPECIAL_TOKEN}")
    with pytest.raises(InputError, match="more than once"):
        read_template(RewardConfig("base", special_tokens=True), str(tmp_path / "own.txt"))
    (tmp_path / "own.txt").write_text("Rate it")
    with pytest.raises(InputError, match=r"does not contain \$prompt"):
        read_template(RewardConfig("base"), str(tmp_path / "own.txt"))


def test_what_is_no_checkpoint(tmp_path, folder):
    with pytest.raises(InputError, match="no such file or folder"):
        verifier(tmp_path / "none")
    with pytest.raises(InputError, match="no folder checkpoint-N"):
        verifier(tmp_path)
    with pytest.raises(InputError, match="batch_size is 0"):
        RewardVerifierConfig("model", batch_size=0)
    for pixels in (0, -5):
        with pytest.raises(InputError, match=f"max_pixels is {pixels}: give a whole number from 1"):
            RewardVerifierConfig("model", max_pixels=pixels)
    with pytest.raises(InputError, match="dtype"):
        verifier(folder, dtype="x")


def test_a_base_that_was_converted(folder, golden, tmp_path):
    """The same tensors, under the same names."""
    convert_qwen(golden / "qwen" / "base", tmp_path / "base")
    files = RewardCheckpoint.open(folder, base=str(tmp_path / "base"))._files()
    want = RewardCheckpoint.open(folder)._files()
    assert files.shapes == want.shapes
    for key in want:
        np.testing.assert_array_equal(files.read(key), want.read(key))
    (tmp_path / "base" / ORBAX_FOLDER).mkdir()
    with pytest.raises(InputError, match="stored by Orbax"):
        RewardCheckpoint.open(folder, base=str(tmp_path / "base"))._files()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.mlp.up_proj.weight": None}, "up_proj.weight missing"),
        ({"model.layers.0.foo.weight": np.zeros(3, np.float32)}, "foo.weight not known"),
        ({"model.layers.0.mlp.up_proj.weight": np.zeros((3, 64), np.float32)}, "up_proj.weight has shape"),
        ({"model.layers.0.mlp.up_proj.weight": np.zeros((96, 64), np.int32)}, "up_proj.weight is stored as int32"),
    ],
)
def test_errors_name_the_file_that_holds_the_tensor(folder, golden, tmp_path, change, message):
    base, source = tmp_path / "base", golden / "qwen" / "base"
    base.mkdir()
    (base / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors") | change
    save_file({key: value for key, value in tensors.items() if value is not None}, base / "model.safetensors")
    with pytest.raises(InputError) as error:
        RewardCheckpoint.open(folder, base=str(base)).load(dtype=np.float32)
    file, step = base / "model.safetensors", folder / "checkpoint-10"
    everywhere = f"{file} and {step}/non_lora_state_dict.safetensors and {step}/adapter_model.safetensors: "
    assert str(error.value).startswith(everywhere if "missing" in message else f"{file}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("data_config", "max_frame_pixels", 0, "max_frame_pixels is 0; expected a whole number above 0"),
        ("data_config", "max_frame_pixels", -1, "max_frame_pixels is -1"),
        ("model_config", "output_dim", 0, "output_dim is 0"),
        ("peft_lora_config", "lora_r", 0, "lora_r is 0"),
        ("inference_config", "VQ_std", 0, "VQ_std is 0.0; expected a number above 0"),
        ("inference_config", "VQ_mean", float("nan"), "cannot be read as JSON (NaN is no number in JSON)"),
    ],
)
def test_configurations_that_are_none(golden, tmp_path, part, key, value, message):
    content = json.loads((golden / "qwen" / "reward" / "model_config.json").read_text())
    content.setdefault(part, {})[key] = value
    path = tmp_path / "model_config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        RewardConfig.read(tmp_path)
    assert str(error.value).startswith(f"{path}: {message}")
