"""``verify`` on recordings of other sizes, made by the PyTorch reference; and that it notices what is wrong."""

# ruff: noqa: E402 (what needs the parity extra is imported after the check for it)

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
pytest.importorskip("diffusers", reason="the parity extra is not installed")
pytest.importorskip("peft", reason="the parity extra is not installed")
from safetensors.numpy import load_file, save_file

from rflow_jax.errors import InputError
from rflow_jax.parity import run
from rflow_jax.parity.measure import ArrayResult, Recording
from tests.kit.compare import save_arrays
from tests.kit.record import RUNS, SCHNELL_SCHEDULE, Run, Sizes, record

pytestmark = pytest.mark.parity

ANOTHER_DEV = Sizes(
    transformer={
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 20,
        "axes_dims_rope": (2, 8, 10),
        "joint_attention_dim": 30,
        "pooled_projection_dim": 18,
        "guidance_embeds": True,
    },
    vae={
        "block_out_channels": (6, 12, 12, 18),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 3,
        "latent_channels": 16,
        "scaling_factor": 0.7,
        "shift_factor": -0.2,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    clip={
        "vocab_size": 800,
        "hidden_size": 18,
        "intermediate_size": 30,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
    t5={"vocab_size": 333, "d_model": 30, "d_kv": 7, "d_ff": 44, "num_heads": 5, "num_layers": 2},
    scheduler={
        "use_dynamic_shifting": True,
        "base_shift": 0.3,
        "max_shift": 1.4,
        "base_image_seq_len": 100,
        "max_image_seq_len": 3000,
    },
    lora_rank=3,
    lora_alpha=8.0,
    batch=3,
    grid=(3, 2),
    condition_grid=(1, 4),
    delta=(2, -5),
    condition_scales=(0.3, 1.0, 2.5),
    c_t=0.6,
    picture=(32, 64),
    condition_picture=(48, 16),
    odd_picture=(60, 29),  # comes out as large as condition_picture: one compilation less
    steps=5,
    max_sequence_length=36,
    long_sequence_length=90,
    runs={
        "igs2_fixed": RUNS["igs2_fixed"],
        "cscale": Run(condition_scale=2.2, guidance_scale=1.5),
        "apart": Run(image_guidance_scale=0.5, flags={"union_cond_attn": False, "latent_lora": True}),
    },
)
# Without guidance and shift, of a network whose latents are coarser and fewer.
SCHNELL = dataclasses.replace(
    ANOTHER_DEV,
    transformer=ANOTHER_DEV.transformer
    | {"num_layers": 2, "num_single_layers": 1, "in_channels": 32, "guidance_embeds": False},
    vae={
        "block_out_channels": (6, 12),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 8,
        "scaling_factor": 0.4,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    clip=ANOTHER_DEV.clip | {"eos_token_id": 773, "bos_token_id": 772, "hidden_act": "gelu"},
    scheduler=SCHNELL_SCHEDULE,
    lora_rank=1,
    lora_alpha=0.5,
    condition_scales=(0.5,),
    picture=(8, 16),
    condition_picture=(8, 4),
    odd_picture=(9, 7),
    images=2,
    steps=2,
    runs={name: RUNS[name] for name in ("nocond", "cond", "igs2_fixed_perstep")},
    seed=1,
)
# The LoRA sits on every linear: also on those that no condition token passes through.
EVERYWHERE = dataclasses.replace(
    ANOTHER_DEV,
    lora_modules=".*",
    runs={
        "cond": Run(),
        "nocond_latent": Run(condition=False, flags={"latent_lora": True}),
    },
    seed=2,
)
SIZES = {"another dev": ANOTHER_DEV, "schnell": SCHNELL, "LoRA everywhere": EVERYWHERE}
OUT, STAGES, GENERATION = "01_transformer_nocond", "02_transformer_cond", "07_generate"


class Verified(NamedTuple):
    """A folder of recordings and what this package computes there, by file."""

    folder: Path
    computed: dict[str, dict]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Verified]:
    """Name of sizes -> their recordings, made and computed once."""

    @cache
    def make(name: str) -> Verified:
        folder = tmp_path_factory.mktemp("recordings") / "made"
        record(folder, SIZES[name])
        recording = Recording(folder)
        with jax.default_matmul_precision("highest"):
            checks = {file: check for file, check in run.CHECKS.items() if recording.has(file)}
            return Verified(folder, {file: dict(check(recording)) for file, check in checks.items()})

    return make


@pytest.fixture
def verdicts(monkeypatch) -> Callable[..., dict[str, ArrayResult]]:
    """Runs ``verify``, on another folder if one is given, without computing everything anew."""

    def again(verified: Verified, folder: Path | None = None) -> dict[str, ArrayResult]:
        replayed = {name: partial(_replay, results) for name, results in verified.computed.items()}
        monkeypatch.setattr(run, "CHECKS", replayed)
        return by_array(run.verify(folder or verified.folder))

    return again


def _replay(results: dict, recording: Recording) -> Iterator[tuple[str, object]]:
    return iter(results.items())


def by_array(verdicts: list[ArrayResult]) -> dict[str, ArrayResult]:
    return {f"{line.file}/{line.stage}": line for line in verdicts}


def statuses(verdicts: dict[str, ArrayResult], *wanted: str) -> set[str]:
    """The arrays with one of these verdicts."""
    return {array for array, line in verdicts.items() if line.status in wanted}


@pytest.fixture
def changed(made, tmp_path) -> Callable[[str, str, Callable], Path]:
    """A copy of the schnell recordings in which one array is another."""

    def change(file: str, array: str, how: Callable[[np.ndarray], np.ndarray]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(made("schnell").folder, folder)
        path = folder / "golden" / f"{file}.npz"
        with np.load(path) as data:
            arrays = dict(data)
        save_arrays(path, arrays | {array: how(arrays[array])})
        return folder

    return change


@pytest.mark.parametrize("name", SIZES)
def test_everything_agrees(made, verdicts, name):
    verified = made(name)
    lines = verdicts(verified)
    exempt = {"03_variants/out_c_factor0_union_false"}
    assert {line.file[:2] for line in lines.values()} == {f"{number:02}" for number in range(1, 8)}
    assert not [str(line) for array, line in lines.items() if line.status != "ok" and array not in exempt]
    assert {array for array, line in lines.items() if line.status == "exempt"} == exempt


def moved(by: float) -> Callable[[np.ndarray], np.ndarray]:
    """An array that is off by a relative error of ``by``."""

    def move(x: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(0).standard_normal(x.shape)
        return (x + by * noise * np.linalg.norm(x) / np.linalg.norm(noise)).astype(x.dtype)

    return move


def first_plus(levels: int, share: float = 0.0) -> Callable[[np.ndarray], np.ndarray]:
    """An array of whole numbers of which the first, or a share of all, is off by ``levels``."""

    def shift(x: np.ndarray) -> np.ndarray:
        out = x.copy().ravel()
        some = out[: max(1, round(share * out.size))]
        some[...] = np.where(some > levels, some - levels, some + levels)
        return out.reshape(x.shape)

    return shift


def with_a_nan(x: np.ndarray) -> np.ndarray:
    out = x.copy()
    out.flat[0] = np.nan
    return out


@pytest.mark.parametrize(
    ("file", "array", "how"),
    [
        (STAGES, "st_single0_cond", moved(3e-5)),
        (STAGES, "st_cond_rope_sin", moved(3e-5)),
        ("03_variants", "out_c_t", moved(3e-5)),
        ("04_vae", "dec", moved(3e-5)),
        ("04_vae", "odd_ids", lambda x: x + np.float32(1)),
        ("05_text", "clip_input_ids", first_plus(1)),
        ("05_text", "t5_untruncated_len", first_plus(1)),
        ("06_scheduler", "mu_tiny", moved(3e-5)),
        ("06_scheduler", "mu_tiny", moved(1e-2)),
        ("06_scheduler", "timesteps_tiny_28", moved(3e-5)),
        (GENERATION, "prompt_embeds", moved(3e-5)),
        (GENERATION, "cond_latents_steps", moved(1.2e-4)),
        (GENERATION, "cond_image_raw", moved(1.2e-4)),
        (GENERATION, "cond_image_uint8", first_plus(2)),
        (GENERATION, "cond_image_uint8", first_plus(1, share=0.01)),
        (OUT, "out", with_a_nan),
        (OUT, "out", lambda x: x[:1]),
    ],
)
def test_one_wrong_array_is_one_failure(made, verdicts, changed, file, array, how):
    assert statuses(verdicts(made("schnell"), changed(file, array, how)), "FAIL") == {f"{file}/{array}"}


@pytest.mark.parametrize(
    ("file", "array", "how"),
    [
        (STAGES, "st_single0_cond", moved(1e-5)),
        (GENERATION, "cond_latents_steps", moved(8e-5)),
        (GENERATION, "nocond_image_uint8", first_plus(1)),
    ],
)
def test_what_is_within_tolerance_passes(made, verdicts, changed, file, array, how):
    assert not statuses(verdicts(made("schnell"), changed(file, array, how)), "FAIL", "not covered")


def test_a_lora_without_effect_is_noticed(made, tmp_path, monkeypatch):
    folder = tmp_path / "without"
    shutil.copytree(made("schnell").folder, folder)
    file = folder / "lora" / "pytorch_lora_weights.safetensors"
    save_file({key: b * ("lora_B" not in key) for key, b in load_file(file).items()}, file)
    monkeypatch.setattr(run, "CHECKS", {STAGES: run.CHECKS[STAGES]})
    lines = {array: line for array, line in by_array(run.verify(folder)).items() if line.file == STAGES}
    stages = {array.partition("/")[2] for array in statuses(lines, "FAIL")}
    assert {"out", "out_reloaded", "st_x_embed_cond", "st_double0_cond", "st_single0_txtimg"} <= stages
    assert not {"out_nolora", "st_x_embed", "st_context_embed", "st_temb", "st_cond_temb"} & stages


def test_a_run_that_breaks_off_fails_alone(made, tmp_path, monkeypatch):
    folder = tmp_path / "broken"
    shutil.copytree(made("schnell").folder, folder)
    file = folder / "golden" / "generate_meta.json"
    meta = json.loads(file.read_text())
    meta["runs"]["cond"]["model_config"]["unheard_of"] = True
    file.write_text(json.dumps(meta))
    monkeypatch.setattr(run, "CHECKS", {GENERATION: run.CHECKS[GENERATION]})
    lines = {array: line for array, line in by_array(run.verify(folder)).items() if line.file == GENERATION}
    broken = {f"{GENERATION}/cond_{stage}" for stage in ("latents_steps", "image_raw", "image_uint8")}
    assert statuses(lines, "FAIL") == broken
    assert all("unheard_of" in lines[array].remark for array in broken)
    assert statuses(lines, "ok") == lines.keys() - broken


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_one_line(made, verdicts, tmp_path, keep):
    folder = tmp_path / "truncated"
    shutil.copytree(made("schnell").folder, folder)
    file = folder / "golden" / f"{STAGES}.npz"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(InputError, match=STAGES) as caught:
        verdicts(made("schnell"), folder)
    assert "\n" not in str(caught.value)
