"""Reward models as they are published, without ``model_config.json``, against PyTorch and PEFT."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from copy import deepcopy

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
peft = pytest.importorskip("peft", reason="the parity extra is not installed")

from safetensors.torch import load_file, save_file

from rflow_jax.commands.main import main
from rflow_jax.errors import InputError
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.verifiers.config import RewardVerifierConfig
from rflow_jax.verifiers.reward import RewardVerifier
from rflow_jax.weights.reward_config import SPECIAL_TOKEN
from tests.kit.hub import FakeHub
from tests.kit.pictures import picture
from tests.kit.qwen import USUAL, make
from tests.parity.test_qwen2_5_vl import packed

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
LANGUAGE = r"language_model\..*_proj"
TIED = USUAL | {"text_config": USUAL["text_config"] | {"tie_word_embeddings": True}, "tie_word_embeddings": True}
# The two kinds that the published file's size fits: (base, LoRA, its type, what is trained beside it).
KINDS = {
    "3B with the tower": (
        TIED,
        {"target_modules": f".*{LANGUAGE}"},
        torch.bfloat16,
        ("visual", "rm_head", "embed_tokens"),
    ),
    "7B with all linears": (
        USUAL,
        {"target_modules": rf".*({LANGUAGE}|embed_tokens|lm_head|rm_head)"},
        torch.float32,
        ("rm_head.base_layer",),
    ),
    "7B with a saved head": (
        USUAL,
        {"target_modules": rf".*({LANGUAGE}|embed_tokens|lm_head)", "modules_to_save": ["rm_head"], "use_rslora": True},
        torch.float32,
        (),
    ),
}
PICTURES = picture(120, 150), picture(90, 60, 1)
PROMPTS = "a bench", "two red apples on a table"


class Published:
    """A folder as it lies on the Hub, and the module that it was saved from."""

    def __init__(self, root, golden, kind):
        shape, lora, dtype, rest = KINDS[kind]
        tokenizer = golden / "qwen" / "base"
        make(root / "base", shape, tokenizer=tokenizer)
        model = make(root / "again", shape, tokenizer=tokenizer)
        grown = QwenTokenizer(tokenizer, added=[SPECIAL_TOKEN])
        model.resize_token_embeddings(len(grown))
        model.rm_head = torch.nn.Linear(shape["text_config"]["hidden_size"], 1, bias=False)
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, **lora)
        self.module = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if any(part in name for part in ("lora_", "rm_head", "embed_tokens", *rest)):
                    parameter.add_(0.5 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape))
                    parameter.copy_(parameter.to(dtype))
        self.step = root / "Image-Verifier" / "checkpoint-10080"
        self.module.save_pretrained(self.step)
        adapter = self.step / "adapter_model.safetensors"
        save_file({key: x.to(dtype) for key, x in load_file(adapter).items()}, adapter, {"format": "pt"})
        content = json.loads((self.step / "adapter_config.json").read_text())
        (self.step / "adapter_config.json").write_text(
            json.dumps(content | {"base_model_name_or_path": str(root / "base")})
        )
        grown.save(self.step / "tokenizer")
        state = self.module.state_dict()
        self.rest = {key: x.to(dtype).clone() for key, x in state.items() if any(part in key for part in rest)}
        self.rest = {key: x for key, x in self.rest.items() if "lora_" not in key}
        if self.rest:
            torch.save(self.rest, self.step / "non_lora_state_dict.pth")

    @torch.no_grad()
    def rewards(self, prepare):
        samples = [
            prepare.sample((image, f"{prompt} {SPECIAL_TOKEN}"))
            for image, prompt in zip(PICTURES, PROMPTS, strict=True)
        ]
        given = packed(prepare, samples)
        places = torch.arange(given["input_ids"].shape[1]).expand(3, len(samples), -1)
        inner = self.module.base_model.model
        scores = inner.rm_head(inner.model(**given, position_ids=places).last_hidden_state)
        return scores[
            given["input_ids"] == prepare.tokenizer.id_of(SPECIAL_TOKEN)
        ].numpy(), scores.square().mean().sqrt()


@pytest.fixture(scope="module", params=list(KINDS))
def published(request, tmp_path_factory, golden):
    return Published(tmp_path_factory.mktemp("published"), golden, request.param)


def verifier(folder, tmp_path, **how):
    (tmp_path / "prompt.md").write_text("$prompt")
    options = {"dtype": "float32", "batch_size": 2, "prompt_file": str(tmp_path / "prompt.md")} | how
    with jax.default_matmul_precision("highest"):
        return RewardVerifier(RewardVerifierConfig(str(folder), **options))


def scores(judge):
    with jax.default_matmul_precision("highest"):
        return np.asarray([verdict.raw for verdict in judge.score(PICTURES, [{"prompt": text} for text in PROMPTS])])


@pytest.mark.parametrize("merge", [True, False])
def test_scores_are_those_of_pytorch(published, tmp_path, caplog, merge):
    judge = verifier(published.step.parent, tmp_path, merge_lora=merge)
    want, size = published.rewards(judge.prepare)
    assert np.abs(scores(judge) - want).max() < TOLERANCE * size
    assert judge.name == "reward Image-Verifier checkpoint-10080"
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for words in (
        "no model_config.json",
        f"base {published.step.parents[1] / 'base'}, LoRA of rank 4 and alpha 6, 1 number an image",
        "scored token: special; and",
        "assumed: pictures of 76800 pixels at most, the wording detailed_special, scores as they are",
    ):
        assert words in said


def test_without_torch(published, tmp_path, monkeypatch):
    """What is in safetensors needs none; a pickle says what is missing."""
    folder = tmp_path / "checkpoint-10080"
    shutil.copytree(published.step, folder)
    want = scores(verifier(folder, tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if published.rest:
        with pytest.raises(InputError, match=r"non_lora_state_dict\.pth: reading a PyTorch pickle needs torch"):
            verifier(folder, tmp_path)
        save_file(published.rest, folder / "non_lora_state_dict.safetensors", {"format": "pt"})
    assert (scores(verifier(folder, tmp_path)) == want).all()


@pytest.mark.parametrize("published", ["7B with a saved head"], indirect=True)
def test_what_is_stated_counts(published, tmp_path, caplog):
    plain = scores(verifier(published.step, tmp_path))
    judge = verifier(published.step, tmp_path, token="last", mean=0.5, std=2.0, lora_alpha=1.0, max_pixels=50_000)
    verdicts = judge.score(PICTURES, [{"prompt": text} for text in PROMPTS])
    raw = np.asarray([verdict.raw[0] for verdict in verdicts])
    assert [verdict.score for verdict in verdicts] == pytest.approx(((raw - 0.5) / 2).tolist())
    assert np.abs(raw - plain[:, 0]).min() > 1e-3
    assert "alpha 1, 1 number an image, scored token: last" in caplog.text
    assert "50000 pixels at most" in caplog.text


@pytest.mark.parametrize("published", ["7B with a saved head"], indirect=True)
def test_by_its_name_on_the_hub(published, tmp_path, monkeypatch, capsys):
    """As its page shows it: a command, and a few lines of Python."""
    name, prompt = "diffusion-cot/Image-Verifier", tmp_path / "prompt.md"
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(monkeypatch, tmp_path / "cache", {name: published.step.parent})
    judge = verifier(name, tmp_path)
    assert judge.name == "reward Image-Verifier checkpoint-10080"
    want = judge.score(PICTURES[:1], [{"prompt": PROMPTS[0]}])[0].score
    PICTURES[0].save("picture.png")
    how = f"--verifier.name reward --verifier.model {name}/checkpoint-10080 --verifier.prompt_file {prompt}"
    with jax.default_matmul_precision("highest"):
        assert main(["score", "picture.png", "--prompt", PROMPTS[0], *how.split(), "--verifier.dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"{want:.6g}\t-\tpicture.png\n"
    assert "checkpoint-10080/tokenizer/tokenizer.json" in hub.fetched


def without(*names):
    def change(folder):
        file = folder / "adapter_model.safetensors"
        tensors = {key: x for key, x in load_file(file).items() if not any(name in key for name in names)}
        save_file(tensors, file, {"format": "pt"})

    return change


def changed_config(**changes):
    def change(folder):
        content = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(content | changes))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("rm_head"), r"no model_config\.json beside it and no rm_head\.weight in it"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "give the LoRA's lora_alpha"),
        (changed_config(base_model_name_or_path=None), "its base model is not known; name it as base"),
        (changed_config(base_model_name_or_path="/mnt/models/own"), "its base model is not known; name it as base"),
        (changed_config(r=5), r"embed_tokens\.lora_embedding_A and its B are .*, not of rank 5 for"),
        (changed_config(use_dora=True), "use_dora is not supported"),
    ],
)
@pytest.mark.parametrize("published", ["7B with a saved head"], indirect=True)
def test_what_cannot_be_known_is_said(published, tmp_path, change, message):
    folder = tmp_path / "checkpoint-10080"
    shutil.copytree(published.step, folder)
    change(folder)
    with pytest.raises(InputError, match=message) as error:
        verifier(folder, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("published", ["7B with all linears"], indirect=True)
def test_a_base_of_another_width(published, tmp_path, golden):
    shape = deepcopy(USUAL)
    shape["text_config"] |= {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape["vision_config"] |= {"out_hidden_size": 32}
    make(tmp_path / "narrow", shape, tokenizer=golden / "qwen" / "base")
    with pytest.raises(InputError, match=r"rm_head\.weight takes 64 numbers, and the base .* has 32"):
        verifier(published.step, tmp_path, base=str(tmp_path / "narrow"))
