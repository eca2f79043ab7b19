"""The PyTorch reference itself against recordings of the original: only then may ours be held against it."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
diffusers = pytest.importorskip("diffusers", reason="the parity extra is not installed")
from safetensors.torch import load_file

from tests.kit.compare import relative_error
from tests.kit.torch_generation import TorchPipeline
from tests.kit.torch_reference import Flags, Reference

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
PICTURE_TOLERANCE = 1e-4  # the recordings name it for whole generations


@pytest.fixture(scope="module")
def reference(golden) -> Reference:
    model = diffusers.FluxTransformer2DModel.from_pretrained(golden / "pipeline" / "transformer")
    scale = json.loads((golden / "golden" / "verify_meta.json").read_text())["lora"]["scale"]
    return Reference(model, lora_matrices(golden / "lora" / "pytorch_lora_weights.safetensors"), scale)


def lora_matrices(file: Path) -> dict:
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    return {name: tuple(tensors[f"{name}.lora_{part}.weight"] for part in "AB") for name in modules}


def recorded(golden: Path, name: str) -> tuple[dict, dict]:
    """(tensors by their names without ``in_``, recorded results)."""
    with np.load(golden / "golden" / f"{name}.npz") as data:
        arrays = dict(data)
    inputs = {key.removeprefix("in_"): torch.from_numpy(a) for key, a in arrays.items() if key.startswith("in_")}
    return inputs, {key: value for key, value in arrays.items() if not key.startswith("in_")}


def check(got: dict, want: dict, tolerance: float = TOLERANCE) -> None:
    assert got.keys() == want.keys()
    errors = {name: relative_error(value, want[name]) for name, value in got.items()}
    assert not {name: error for name, error in errors.items() if error > tolerance}


def test_without_a_condition(golden, reference):
    inputs, want = recorded(golden, "01_transformer_nocond")
    with reference.without_lora():
        base = reference(inputs)
    latent = reference(inputs, Flags(latent_lora=True))
    check({"out": base, "out_diffusers": base, "out_lora_loaded": reference(inputs), "out_lora_latent": latent}, want)


def test_every_stage(golden, reference):
    inputs, want = recorded(golden, "02_transformer_cond")
    stages = {}
    out = reference(inputs, stages=stages)
    with reference.without_lora():
        without = reference(inputs)
    check(stages | {"out": out, "out_nolora": without, "out_reloaded": out}, want)


def test_flags(golden, reference):
    own, want = recorded(golden, "03_variants")
    inputs, _ = recorded(golden, "02_transformer_cond")
    full = inputs | {f"condition_{kind}": own[f"condition_{kind}_full"] for kind in ("latents", "ids")}
    low, high = (float(own[f"c_factor{k}"]) for k in range(2))
    got = {
        "out_union_false": reference(inputs, Flags(union_cond_attn=False)),
        "out_latent_lora": reference(inputs, Flags(latent_lora=True)),
        "out_union_false_latent_lora": reference(inputs, Flags(union_cond_attn=False, latent_lora=True)),
        "out_c_factor0": reference(inputs, Flags(condition_scale=low)),
        "out_c_factor1": reference(inputs, Flags(condition_scale=high)),
        "out_c_factor0_union_false": reference(inputs, Flags(condition_scale=low, union_cond_attn=False)),
        "out_add_cond_attn": reference(full, Flags(add_cond_attn=True)),
        "out_full_default": reference(full),
        "out_all_flags": reference(full, Flags(union_cond_attn=False, add_cond_attn=True, latent_lora=True)),
        "out_c_t": reference(inputs, Flags(c_t=0.25)),
    }
    check(got, want)


def test_generation(golden, reference):
    with np.load(golden / "golden" / "07_generate.npz") as data:
        z = dict(data)
    meta = json.loads((golden / "golden" / "generate_meta.json").read_text())
    pipe = diffusers.FluxPipeline.from_pretrained(golden / "pipeline", transformer=reference.model)
    pipeline = TorchPipeline(pipe, reference)
    for name in meta["runs"]:
        if name == "igs2_original":  # its unconditional branch sees the condition
            continue
        got = dict(pipeline.run(meta, name, z))
        picture = got.pop("image_uint8").astype(int)
        check(got, {key: z[f"{name}_{key}"] for key in got}, PICTURE_TOLERANCE)
        assert abs(picture - z[f"{name}_image_uint8"]).max() <= 1
