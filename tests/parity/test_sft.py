"""Fine-tuning on chats against Transformers and PEFT: its loss, its gradients, and what it leaves."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
peft = pytest.importorskip("peft", reason="the parity extra is not installed")
import transformers

from rflow_jax.models.qwen2_5_vl.layout import Grid
from rflow_jax.training.checkpoints import Checkpoints
from rflow_jax.training.config import CheckpointConfig
from rflow_jax.training.qwen.batches import ArrayBatch
from rflow_jax.training.qwen.config import QwenLoraConfig
from rflow_jax.training.sft.config import ChatValidationConfig, SftTaskConfig
from rflow_jax.training.sft.loss import weighed
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat
from rflow_jax.vlm.qwen_processing import normalised
from tests.kit.chats import make_chats
from tests.kit.pictures import picture
from tests.kit.qwen import PAD, SHAPES, make
from tests.kit.sft import SftRun, sft_config

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5


class Case:
    """A model of Transformers, our fine-tuning of it, and its chats in the form that Transformers takes."""

    def __init__(self, root: Path, shape: str, golden: Path):
        self.base = root / "base"
        self.theirs = make(self.base, SHAPES[shape], tokenizer=golden / "qwen" / "base")
        (root / "chats").mkdir()
        self.chats = make_chats(root / "chats")

    def run(self, **how: Any) -> SftRun:
        return SftRun(sft_config(self.chats, base=self.base, **how))

    def given(self, run: SftRun) -> dict[str, Any]:
        maker, source = run.task._maker, run.task._source
        examples = [maker.example(source.read(index)) for index in range(len(source))]
        longest = max(len(example.learned) for example in examples)
        ids, labels = (np.full((len(examples), longest), fill) for fill in (PAD, -100))
        for k, example in enumerate(examples):
            own = example.sample.ids
            ids[k, : len(own)] = own
            labels[k, : len(own)] = np.where(example.learned, own, -100)
        pictures = [one for example in examples for one in example.sample.pictures]
        grids: list[Grid] = [grid for _, grid in pictures]
        pixels = [np.asarray(normalised(jnp.asarray(patches)[None], maker.prepare.rules))[0] for patches, _ in pictures]
        mask = np.arange(longest) < np.asarray([[len(example.learned)] for example in examples])
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "attention_mask": torch.tensor(mask.astype(np.int64)),
            "pixel_values": torch.tensor(np.concatenate(pixels)),
            "image_grid_thw": torch.tensor(grids),
        }


@pytest.fixture(scope="module", params=SHAPES)
def case(request, tmp_path_factory, golden) -> Case:
    return Case(tmp_path_factory.mktemp("sft"), request.param, golden)


def our_batch(run: SftRun) -> Any:
    maker, source = run.task._maker, run.task._source
    examples = [maker.example(source.read(index)) for index in range(len(source))]
    return run.task.put(ArrayBatch(0, maker.inputs(examples, len(examples)), [], 0.0, ""))


def our_loss(run: SftRun) -> float:
    chats = weighed(our_batch(run), 1)
    with jax.default_matmul_precision("highest"):
        return float(run.task._objective(run.state.trainable, run.task.exporter.parts.frozen, chats)[0])


def test_the_loss_and_its_gradient_are_those_of_transformers(case):
    everything = {"lora": QwenLoraConfig(target_modules=None), "trainable_parameters": ".*"}
    run = case.run(**everything)
    model = case.theirs.train(False)
    model.zero_grad()
    want = model(**case.given(run)).loss
    want.backward()
    validation = case.run(validation=ChatValidationConfig(chats=str(case.chats))).task.open_validation(Path())
    with jax.default_matmul_precision("highest"):
        _, report = run._step(run.state, our_batch(run))
        tried = validation.run(0, case.run().state.trainable)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None))
    assert float(report.loss) == pytest.approx(want.item(), rel=TOLERANCE)
    assert float(report.gradient_norm) == pytest.approx(norm.item(), rel=1e-4)
    assert tried["validation/loss"] == pytest.approx(want.item(), rel=TOLERANCE)


def exported(run: SftRun, out: Path) -> Path:
    kept = Checkpoints(out, CheckpointConfig())
    kept.save(run.state, {}, {}, run.task.exporter)
    kept.close()
    return out / run.task.exporter.exports.format(step=int(run.state.step))


def test_the_adapter_loads_in_peft_and_in_our_chat(case, tmp_path):
    run = case.run()
    run.losses(3)
    folder = exported(run, tmp_path)
    base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(case.base)
    given = case.given(run)
    with torch.no_grad():
        before = base(**given).loss.item()
        want = peft.PeftModel.from_pretrained(base, folder).eval()(**given).loss.item()
    assert abs(want - before) > 0.1, "the adapter does nothing"
    assert our_loss(run) == pytest.approx(want, rel=TOLERANCE)
    same_answers(case, run, folder, tmp_path)


def same_answers(case: Case, run: SftRun, folder: Path, tmp_path: Path) -> None:
    """The chat with the adapter says what the chat with the merged model says, and not what the base says."""
    merged = case.run(sft=SftTaskConfig(merge=True))
    merged.state = run.state
    before = our_loss(merged)
    whole = exported(merged, tmp_path / "merged")
    assert our_loss(merged) == before, "the export has changed what is trained"
    how = {"dtype": "float32", "batch_size": 2, "max_new_tokens": 6}
    questions = [ChatQuery(None, (picture(80, 70, 5), "What is it?")), ChatQuery("Be brief.", ("Why?",))]
    with jax.default_matmul_precision("highest"):
        plain, adapted, other = (
            QwenChat(QwenChatConfig(str(model), adapter=adapter, **how)).answer(questions)
            for model, adapter in ((case.base, None), (case.base, str(folder)), (whole, None))
        )
    assert adapted == other != plain


def test_a_full_fine_tune_leaves_a_folder_of_transformers(case, tmp_path):
    named = r"language\..*|vision\.merger\..*"
    run = case.run(lora=QwenLoraConfig(target_modules=None), trainable_parameters=named)
    run.losses(2)
    folder = exported(run, tmp_path)
    assert folder == tmp_path / "model" / "2"
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        want = model(**case.given(run)).loss.item()
    assert our_loss(run) == pytest.approx(want, rel=TOLERANCE)
