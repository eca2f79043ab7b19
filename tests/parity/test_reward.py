"""The reward model against PyTorch and PEFT, in every form the original's checkpoints have."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
peft = pytest.importorskip("peft", reason="the parity extra is not installed")

from rflow_jax.errors import InputError
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.vlm.qwen_batching import Sizes, batch_of
from rflow_jax.vlm.qwen_processing import QwenProcessor, read_image_processor_config
from rflow_jax.vlm.qwen_programs import Scoring, rewards
from rflow_jax.weights.reward import RewardCheckpoint
from rflow_jax.weights.reward_config import SPECIAL_TOKEN
from tests.kit.compare import relative_error
from tests.kit.pictures import picture
from tests.kit.qwen import PAD, USUAL, make
from tests.parity.test_qwen2_5_vl import packed

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
RANK, ALPHA = 3, 5
# The linears of both parts: also the tower's fused q, k and v.
TARGETS = r".*(language_model.*_proj|visual\.blocks.*(qkv|proj|_proj))"
FORMS = ("adapter", "adapter and pickle", "everything in one")


class Trained:
    """A base model, and a reward model on it with LoRA, new token and head, as PyTorch holds it."""

    def __init__(self, root, golden):
        self.root = root
        self.base = root / "base"
        make(self.base, USUAL, tokenizer=golden / "qwen" / "base")
        self.model = make(root / "again", USUAL, tokenizer=golden / "qwen" / "base")
        self.rows = len(QwenTokenizer(self.base, added=[SPECIAL_TOKEN]))
        self.model.resize_token_embeddings(self.rows)
        self.model.rm_head = torch.nn.Linear(USUAL["text_config"]["hidden_size"], 1, bias=False)
        torch.manual_seed(5)
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
        self.peft = peft.get_peft_model(self.model, lora).eval()
        with torch.no_grad():
            for name, parameter in self.peft.named_parameters():
                if any(part in name for part in ("lora_", "rm_head", "embed_tokens")):
                    # Enough to matter (tested below), not so much that rounding grows from layer to layer.
                    parameter.add_(0.5 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape))

    def save(self, form: str):
        """The original's folder in one of its forms."""
        folder = self.root / form.replace(" ", "_")
        step = folder / "checkpoint-7"
        (folder / "checkpoint-3").mkdir(parents=True)  # an older one, which is not read
        step.mkdir()
        state = self.peft.state_dict()
        if form == "everything in one":
            torch.save(state, step / "model.pth")
        else:
            self.peft.save_pretrained(step, save_embedding_layers=form == "adapter")
            rest = {key: value for key, value in state.items() if "rm_head" in key or "embed_tokens" in key}
            if form == "adapter":  # the embedding is in the adapter's file
                rest = {key: value for key, value in rest.items() if "rm_head" in key}
            torch.save(rest, step / "non_lora_state_dict.pth")
        config = {
            "data_config": {"max_frame_pixels": 40_000, "prompt_template_type": "none"},
            "model_config": {"model_name_or_path": "../base", "use_special_tokens": True, "output_dim": 1},
            "peft_lora_config": {"lora_r": RANK, "lora_alpha": ALPHA},
            "inference_config": {"VQ_mean": 0.5, "VQ_std": 2.0},
        }
        (folder / "model_config.json").write_text(json.dumps(config))
        return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, golden) -> Trained:
    return Trained(tmp_path_factory.mktemp("reward"), golden)


@pytest.fixture(scope="module")
def folders(trained):
    return {form: trained.save(form) for form in FORMS}


def prepared(checkpoint, model):
    tokenizer = QwenTokenizer(checkpoint.base, added=[SPECIAL_TOKEN])
    prepare = QwenProcessor(tokenizer, read_image_processor_config(checkpoint.base, model.config), model.config, 4096)
    chats = [
        (picture(120, 150), f"a bench {SPECIAL_TOKEN}"),
        (picture(90, 60, 1), "and", picture(64, 64, 2), f"twice the same thing in a longer text {SPECIAL_TOKEN}"),
    ]
    return prepare, [prepare.sample(parts) for parts in chats]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("merge", [True, False])
def test_rewards_are_those_of_pytorch(trained, folders, form, merge):
    checkpoint = RewardCheckpoint.open(folders[form])
    assert checkpoint.step.name == "checkpoint-7"
    model = checkpoint.load(dtype=jnp.float32, merge=merge)
    prepare, samples = prepared(checkpoint, model)
    given = packed(prepare, samples)
    places = torch.arange(given["input_ids"].shape[1]).expand(3, len(samples), -1)
    with torch.no_grad():
        hidden = trained.peft.base_model.model.model(**given, position_ids=places).last_hidden_state
        scores = trained.peft.base_model.model.rm_head(hidden)
    special = prepare.tokenizer.id_of(SPECIAL_TOKEN)
    lengths = given["attention_mask"].sum(1)
    want = {
        "special": scores[given["input_ids"] == special],
        "last": torch.stack([row[n - 1] for row, n in zip(scores, lengths, strict=True)]),
        "mean": torch.stack([row[: n - 1].mean(0) for row, n in zip(scores, lengths, strict=True)]),
    }
    inputs = batch_of(samples, model.config, pad=PAD, sizes=Sizes.bucketed(samples, model.config, 3))
    graph, state = nnx.split(model)
    for token in want if form == "adapter" else ("special",):
        with jax.default_matmul_precision("highest"):
            ours = rewards(graph, prepare.rules, Scoring(token, special), state, inputs)
        # By the size of a score of any token: these few may be small by cancellation.
        assert np.abs(ours[:2] - want[token].numpy()).max() < TOLERANCE * scores.square().mean().sqrt()


def test_the_lora_and_the_head_matter(folders):
    """Otherwise the comparison above would show nothing."""
    checkpoint = RewardCheckpoint.open(folders["adapter"])
    model = checkpoint.load(dtype=jnp.float32, merge=False)
    prepare, samples = prepared(checkpoint, model)
    inputs = batch_of(samples, model.config, pad=PAD, sizes=Sizes.bucketed(samples, model.config, 3))
    graph, state = nnx.split(model)
    special = prepare.tokenizer.id_of(SPECIAL_TOKEN)
    how = [Scoring("special", special, lora=lora) for lora in (True, False)]
    ours = [np.asarray(rewards(graph, prepare.rules, one, state, inputs)[:2]) for one in how]
    assert relative_error(*ours) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["peft_lora_config"].update(lora_r=4), "rank 3, model_config.json says lora_r 4"),
        (lambda config: config["model_config"].update(output_dim=2), "rm_head.weight has shape"),
        (lambda config: config["model_config"].pop("model_name_or_path"), "not the configuration of a reward model"),
        (lambda config: config["model_config"].update(model_name_or_path="../nobody"), "no such file or folder"),
        (
            lambda config: config["model_config"].update(use_special_tokens=False, reward_token="first"),
            "expected last, mean or special",
        ),
    ],
)
def test_what_does_not_fit_is_said(folders, tmp_path, change, message):
    folder = tmp_path / "changed"
    shutil.copytree(folders["adapter"], folder)
    (tmp_path / "base").symlink_to(folders["adapter"].parent / "base")
    config = json.loads((folder / "model_config.json").read_text())
    change(config)
    (folder / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        RewardCheckpoint.open(folder).load(dtype=jnp.float32)


def test_steps(folders):
    with pytest.raises(InputError, match="no checkpoint-4, only 3, 7"):
        RewardCheckpoint.open(folders["adapter"], step=4)
    with pytest.raises(InputError, match=r"no model\.pth and no non_lora_state_dict"):
        RewardCheckpoint.open(folders["adapter"], step=3).load(dtype=jnp.float32)
