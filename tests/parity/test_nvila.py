"""NVILA at other sizes against PyTorch, put together from Transformers' modules; and ``verify`` on such recordings."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
import transformers
from torch import nn

from rflow_jax.models.nvila import Nvila
from rflow_jax.parity import nvila, run
from rflow_jax.parity.measure import Recording
from rflow_jax.verifiers.config import NvilaVerifierConfig
from rflow_jax.verifiers.nvila import NvilaVerifier
from tests.kit.compare import save_arrays
from tests.kit.nvila import ANOTHER, TorchNvila
from tests.kit.nvila_recordings import IMAGES, record
from tests.kit.torch_models import on_meta
from tests.unit.models.test_vision_sizes import REAL

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def recordings(golden, tmp_path_factory):
    """(folder, what this package computes there, by file)."""
    folder = tmp_path_factory.mktemp("nvila") / "made"
    record(folder, golden, ANOTHER)
    recording = Recording(folder)
    with jax.default_matmul_precision("highest"):
        return folder, {file: dict(check(recording)) for file, check in nvila.checks(recording).items()}


@pytest.fixture
def verdicts(monkeypatch, recordings):
    """Runs ``verify`` on a folder without computing everything anew."""
    replayed = {file: lambda _, results=results: iter(results.items()) for file, results in recordings[1].items()}
    monkeypatch.setattr(run, "CHECKS", {})
    monkeypatch.setattr(nvila, "checks", lambda recording: replayed)
    return run.verify


def test_verify_on_another_size(recordings, verdicts):
    lines = verdicts(recordings[0])
    assert {line.file for line in lines if line.file.startswith("nvila/case_")} == {
        f"nvila/case_{image}_{mode}" for image in IMAGES for mode in ("chat", "plain", "sana")
    }
    assert [str(line) for line in lines if line.status not in ("ok", "input")] == []
    inputs = {f"{line.file}/{line.stage}" for line in lines if line.status == "input"}
    assert inputs == {
        *(f"nvila/vision_{image}/image" for image in IMAGES),
        *(f"nvila/projector/g{grid}_in" for grid in (2, 5, 6)),
    }
    assert {line.tolerance for line in lines if line.status == "ok"} == {0.0, 0.005, 1e-4}


@pytest.mark.parametrize(
    ("file", "array", "change"),
    [
        ("case_wide_chat", "logits_last", lambda x: x * np.float32(1.0003)),
        ("case_wide_chat", "input_ids", lambda x: x + (np.arange(len(x)) == 5)),
        ("case_one_sana", "greedy_tokens", lambda x: x + 1),
        ("case_one_plain", "embed_kind", lambda x: x[::-1]),
        ("vision_one", "tower", lambda x: x * np.float32(1.0003)),
        ("vision_wide", "tiles_u8", lambda x: x[::-1]),
        ("projector", "g5_layer3", lambda x: x * np.float32(1.0003)),
        ("rope", "inv_freq", lambda x: x * np.float32(1.0003)),
    ],
)
def test_one_wrong_array_is_one_failure(recordings, verdicts, tmp_path, file, array, change):
    folder = tmp_path / "changed"
    shutil.copytree(recordings[0], folder)
    path = folder / "nvila" / "golden" / f"{file}.npz"
    with np.load(path) as data:
        arrays = dict(data)
    save_arrays(path, arrays | {array: change(arrays[array])})
    assert [f"{line.file}/{line.stage}" for line in verdicts(folder) if line.status == "FAIL"] == [
        f"nvila/{file}/{array}"
    ]


def test_a_case_that_cannot_be_asked_fails_alone(recordings, monkeypatch, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(recordings[0], folder)
    path = folder / "nvila" / "golden" / "meta.json"
    meta = json.loads(path.read_text())
    meta["cases"]["one_chat"]["mode"] = "unheard of"
    path.write_text(json.dumps(meta))
    monkeypatch.setattr(run, "CHECKS", {})
    lines = [line for line in run.verify(folder) if line.status not in ("ok", "input")]
    assert {line.file for line in lines} == {"nvila/case_one_chat"}
    assert all("unheard of" in line.remark for line in lines)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_through_the_verifier(golden, tmp_path, dtype):
    """The same numbers as PyTorch's on the same rounded weights, computed in float32."""
    network = TorchNvila(dataclasses.replace(ANOTHER, dtype=dtype, seed=3))
    network.save(tmp_path / "checkpoint", golden / "nvila" / "checkpoint")
    config = NvilaVerifierConfig(str(tmp_path / "checkpoint"), dtype="float32", template="question", batch_size=2)
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)) for size in ((40, 40), (50, 90), (200, 31))]
    prompts = ["a cat", "two dogs left of a bench", "Ünïcode 日本"]
    with jax.default_matmul_precision("highest"):
        verifier = NvilaVerifier(config)
        verdicts = verifier.score(images, [{"prompt": prompt} for prompt in prompts])
    for image, prompt, verdict in zip(images, prompts, verdicts, strict=True):
        question = verifier._question(image, prompt)
        pixels = (question.pictures.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
        _, _, tokens = network.features(pixels, ANOTHER.config["mm_vision_select_layer"])
        x = network.embed(question.layout.ids, question.layout.feature, tokens)
        logits = network.answer(x, 1, verifier.model.tokenizer.size)[2][0]
        yes, no = logits[verifier.model.tokenizer.yes], logits[verifier.model.tokenizer.no]
        assert (verdict.raw["yes"], verdict.raw["no"]) == pytest.approx((yes, no), abs=1e-4)
        assert verdict.label == ("yes" if yes > no else "no")


def test_real_size():
    config, parameters, tensors = REAL[Nvila]
    d, e = config.vision.hidden_size, config.language.hidden_size
    tower = transformers.SiglipVisionConfig(**vars(config.vision), vision_use_head=False)
    sizes = {key: value for key, value in vars(config.language).items() if key != "mrope_section"}
    with torch.device("meta"):
        projector = nn.ModuleList(
            [nn.LayerNorm(9 * d), nn.Linear(9 * d, 3 * d), nn.LayerNorm(3 * d), nn.Linear(3 * d, e), nn.Linear(e, e)]
        )
    meta = (
        on_meta(transformers.SiglipVisionModel, tower),
        projector,
        on_meta(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**sizes)),
    )
    assert sum(p.numel() for part in meta for p in part.parameters()) == parameters
    assert sum(1 for part in meta for _ in part.parameters()) == tensors
