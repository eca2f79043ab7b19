"""Models in this process: what is wrong with one item is an error of that item, and no other result changes."""

from __future__ import annotations

import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import rflow_jax.verifiers.reward as reward_module
from rflow_jax.errors import InputError
from rflow_jax.verifiers import VERIFIERS, make_verifier
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat
from tests.kit.asking import pictures
from tests.kit.clip import make_clip

PROMPTS = ("an owl", "a red drum", "two kites", "a clock")
BAD = ("no image", "cut off", "too long", "no prompt")
REASONS = dict(zip(BAD, ("decoded", "decoded", "too long", "no prompt"), strict=True))
LOCAL = ("reward", "nvila", "clip")
LONG = "word " * 5000


def good():
    return [(image.resize((64, 64)), {"prompt": prompt}) for image, prompt in zip(pictures(4), PROMPTS, strict=True)]


def bad(kind):
    """An image and its metadata with something wrong."""
    image, item = good()[0]
    if kind == "too long":
        return image, {"prompt": LONG}
    if kind == "no prompt":
        return image, {"tag": "counting"}
    file = io.BytesIO()
    image.save(file, "PNG" if kind == "no image" else "JPEG")
    content = file.getvalue()
    if kind == "no image":  # its header is whole, what follows is not
        return Image.open(io.BytesIO(content[:60] + bytes(len(content) - 60))), item
    return Image.open(io.BytesIO(content[: len(content) // 2])), item


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    return {
        "reward": golden / "qwen/reward",
        "nvila": golden / "nvila/checkpoint",
        "clip": make_clip(tmp_path_factory.mktemp("clip") / "clip", golden),
        "qwen": golden / "qwen/base",
    }


@pytest.fixture(scope="module")
def made(folders):
    """Each model, made when it is asked for the first time."""
    found = {}

    def make(kind):
        if kind not in found:
            how = {"batch_size": 2, "dtype": "float32"}
            model = str(folders[kind])
            if kind == "qwen":
                found[kind] = QwenChat(QwenChatConfig(model, max_new_tokens=4, **how))
            else:
                found[kind] = make_verifier(VERIFIERS.parse({"name": kind, "model": model} | how))
        return found[kind]

    return make


def results(model, pairs):
    """(score or text, reason) of each image."""
    if isinstance(model, QwenChat):
        answers = model.answer([ChatQuery(None, (item["prompt"], image)) for image, item in pairs])
        return [(None, str(a)) if isinstance(a, InputError) else (a, None) for a in answers]
    images, items = zip(*pairs, strict=True)
    return [(verdict.score, verdict.error) for verdict in model.score(images, items)]


@pytest.mark.parametrize("kind", [*LOCAL, "qwen"])
def test_a_bad_item_changes_no_other(made, kind):
    model = made(kind)
    want = results(model, good())
    assert all(reason is None for _, reason in want)
    faults = [fault for fault in BAD if not (kind == "qwen" and fault == "no prompt")]  # a question is its prompt
    pairs = [pair for fault, own in zip(faults, good(), strict=False) for pair in (bad(fault), own)]
    found = results(model, [*pairs, *good()[len(faults) :]])
    for k, fault in enumerate(faults):
        value, reason = found[2 * k]
        assert value is None
        assert REASONS[fault] in reason
    kept = [*found[1 : 2 * len(faults) : 2], *found[2 * len(faults) :]]
    for (value, reason), (wanted, _) in zip(kept, want, strict=True):
        assert reason is None
        assert value == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-5, abs=1e-5))


@pytest.mark.parametrize("kind", [*LOCAL, "qwen"])
def test_a_prompt_is_text_and_ends_no_message(made, kind):
    image, item = good()[0]
    mark = "<|endoftext|>"
    found = results(made(kind), [(image, {"prompt": text}) for text in (item["prompt"], "\ud800", f"a cat {mark} yes")])
    assert found[0][1] is None
    assert "contains an unpaired surrogate" in found[1][1]
    assert f"contains the special token {mark}" in found[2][1]


@pytest.mark.parametrize("kind", LOCAL)
def test_a_score_that_is_no_number_changes_no_other(made, kind, monkeypatch):
    verifier = made(kind)
    want = results(verifier, good())
    where, name = {
        "reward": (reward_module, "rewards"),
        "nvila": (verifier._programs if kind == "nvila" else None, "first_logits"),
        "clip": (verifier, "_scores"),
    }[kind]
    right, calls = getattr(where, name), []

    def broken(*args):
        calls.append(args)
        numbers = jnp.asarray(right(*args))
        return np.asarray(numbers.at[1].set(jnp.nan) if len(calls) == 1 else numbers)

    monkeypatch.setattr(where, name, broken)
    found = results(verifier, good())
    (lost,) = (k for k, (value, _) in enumerate(found) if value is None)
    assert "not a number" in found[lost][1]
    for k in {0, 1, 2, 3} - {lost}:
        assert found[k] == (pytest.approx(want[k][0], rel=1e-5, abs=1e-5), None)


# ---- checkpoints of another architecture ----


@pytest.fixture(scope="module")
def llama(golden, tmp_path_factory):
    """A language model that looks at nothing, as Transformers lays it out."""
    folder = tmp_path_factory.mktemp("llama") / "llama"
    shutil.copytree(golden / "qwen/base", folder, ignore=shutil.ignore_patterns("*.safetensors", "preproc*", "chat*"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 520}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    weights = {f"{name}.weight": np.zeros((520, 16), np.float32) for name in ("model.embed_tokens", "lm_head")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def others(folders, llama, golden, tmp_path_factory):
    """Further folders, among them a reward checkpoint of another base."""
    root = tmp_path_factory.mktemp("others")
    for name, base in {"reward of llama": llama, "reward of clip": folders["clip"]}.items():
        shutil.copytree(golden / "qwen/reward", root / name)
        config = json.loads((root / name / "model_config.json").read_text())
        config["model_config"]["model_name_or_path"] = str(base)
        (root / name / "model_config.json").write_text(json.dumps(config))
    return folders | {"llama": llama, "flux": golden / "pipeline"} | {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("reward", "llama", "no folder checkpoint-N; is it the folder of a reward model?"),
        ("reward", "clip", "no folder checkpoint-N"),
        ("reward", "qwen", "no folder checkpoint-N"),
        ("reward", "reward of llama", "model_type 'llama' is not supported, only 'qwen2_5_vl'"),
        ("reward", "reward of clip", "model_type 'clip' is not supported, only 'qwen2_5_vl'"),
        ("nvila", "llama", "an NVILA checkpoint holds vision_tower, mm_projector, llm"),
        ("nvila", "clip", "an NVILA checkpoint holds"),
        ("nvila", "qwen", "an NVILA checkpoint holds"),
        ("clip", "llama", "model_type 'llama' is not supported, only 'clip'"),
        ("clip", "nvila", "model_type 'vila' is not supported, only 'clip'"),
        ("clip", "flux", "config.json: no such file"),
        ("qwen", "llama", "model_type 'llama' is not supported, only 'qwen2_5_vl'"),
        ("qwen", "clip", "model_type 'clip' is not supported, only 'qwen2_5_vl'"),
        ("qwen", "nvila", "model_type 'vila' is not supported, only 'qwen2_5_vl'"),
        ("qwen", "reward", "config.json: no such file"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_one_line(others, kind, given, words):
    folder = str(others[given])
    config = QwenChatConfig(folder) if kind == "qwen" else VERIFIERS.parse({"name": kind, "model": folder})
    make = QwenChat if kind == "qwen" else make_verifier
    with pytest.raises(InputError) as caught:
        make(config)
    assert words in str(caught.value)
    assert str(others[given.removeprefix("reward of ")]) in str(caught.value)
    assert "\n" not in str(caught.value)
