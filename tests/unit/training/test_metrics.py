"""What a run tells, and its settings."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from rflow_jax.data import workers
from rflow_jax.errors import InputError
from rflow_jax.training.config import CorrectorRunConfig, LoggingConfig, OptimizerConfig
from rflow_jax.training.metrics import METRICS, SKIPPED_SHOWN, MetricWriter, known_tflops, peak_flops
from rflow_jax.training.optimizers import learning_rate
from rflow_jax.training.prefetch import prefetch_to_device
from rflow_jax.training.qwen.config import QwenLoraConfig
from rflow_jax.training.run_folder import CONFIG, write_config
from rflow_jax.utils import cli

ROOT = Path(__file__).parents[3]


def tell(watch: MetricWriter, steps: range, skipped: list[str] | None = None) -> None:
    for step in steps:
        report = SimpleNamespace(loss=np.float32(step), gradient_norm=np.float32(0.5), d=None)
        watch.step(step, report, SimpleNamespace(skipped=skipped or [], waited=0.0, digest=f"{step}"), {"rule": step})


def watch(out: Path, resumed: int = 0, **how) -> MetricWriter:
    config = LoggingConfig(every=2, peak_tflops=1.0, **how)
    return MetricWriter(out, config, steps=5, batch_size=4, flops=1e9, resumed=resumed)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_every_step_is_a_line_and_the_pace_comes_now_and_then(tmp_path, capsys):
    one = watch(tmp_path)
    tell(one, range(1, 6))
    one.close()
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert ["mfu" in line for line in found] == [False, True, False, True, True]
    assert found[3]["drawn"] == {"rule": 4}
    assert 0 < found[1]["mfu"] * 1e12 == pytest.approx(found[1]["samples_per_s"] * 1e9 / 8)  # on 8 devices
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in shown] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "loss 1.5000" in shown[0]  # the mean since the last line
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_drops_the_lines_past_its_step_and_one_that_was_cut(tmp_path):
    tell(watch(tmp_path, tensorboard=False), range(1, 5))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5, "lo')
    tell(watch(tmp_path, resumed=2, tensorboard=False), range(3, 6))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_validation_that_an_earlier_start_made_is_known(tmp_path):
    first = watch(tmp_path, tensorboard=False)
    for step in (0, 2, 4):
        tell(first, range(step - 1, step + 1) if step else range(0))
        first.validated(step, {"validation/all": 1.0})
    assert [step for step in range(6) if watch(tmp_path, resumed=3, tensorboard=False).was_validated(step)] == [0, 2]
    assert not watch(tmp_path, resumed=1, tensorboard=False).was_validated(2)


def test_skipped_records_are_named_up_to_a_number_and_all_counted(tmp_path, capsys):
    tell(watch(tmp_path, tensorboard=False), range(1, 6), skipped=["a: no picture"] * 7)
    assert capsys.readouterr().err.count("skipped a: no picture") == SKIPPED_SHOWN
    assert lines(tmp_path)[-1]["skipped"] == 35


def test_every_process_names_what_it_skipped_and_the_line_has_the_sum(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine + 10, mine * 0]))
    tell(watch(tmp_path, tensorboard=False), range(1, 3), skipped=["a: no picture"])
    assert lines(tmp_path)[-1]["skipped"] == 2 + 12
    assert "14 skipped" in capsys.readouterr().err
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    tell(watch(tmp_path / "none", tensorboard=False), range(1, 3), skipped=["b: no picture"])
    assert capsys.readouterr().err.splitlines() == ["process 1: skipped b: no picture"] * 2


def test_what_is_done_aside_is_no_training_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    one = watch(tmp_path, tensorboard=False)
    for step in (1, 2):
        now[0] += 2
        with one.paused():
            now[0] += 50
        tell(one, range(step, step + 1))
    assert lines(tmp_path)[-1]["samples_per_s"] == pytest.approx(2 * 4 / 4)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_card(kind, tflops, monkeypatch):
    assert known_tflops(kind) == tflops
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    assert peak_flops(LoggingConfig(), "float32") is None
    assert peak_flops(LoggingConfig(peak_tflops=2.0), "float32") == 2e12 * jax.device_count()


def test_tensorboard_leaves_out_what_came_after_the_checkpoint(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=lambda *a, **k: opened.append(k)))
    watch(tmp_path, resumed=7)
    assert opened == [{"purge_step": 8}]


def fake_wandb(monkeypatch) -> tuple[list, dict]:
    """What is logged, and with what the run is started."""
    logged, started = [], {}
    fake = SimpleNamespace(
        init=lambda **how: started.update(how),
        log=lambda numbers, step: logged.append((step, numbers)),
        finish=lambda: started.update(finished=True),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return logged, started


def test_wandb_knows_a_run_by_its_folder_and_not_by_the_folders_name(tmp_path, monkeypatch):
    _, started = fake_wandb(monkeypatch)
    ids = []
    for name in ("a", "b", "a"):
        (tmp_path / name / "corrector").mkdir(parents=True, exist_ok=True)
        watch(tmp_path / name / "corrector", wandb="corrector", tensorboard=False)
        ids.append(started["id"])
    assert ids[0] == ids[2] != ids[1]


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    logged, started = fake_wandb(monkeypatch)
    one = watch(tmp_path, wandb="corrector", tensorboard=False)
    tell(one, range(1, 3))
    one.close()
    assert started["project"] == "corrector"
    assert started["finished"]
    assert [step for step, _ in logged] == [1, 2]
    assert logged[1][1]["drawn/rule"] == 2


def test_wandb_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        watch(tmp_path, wandb="corrector")


def test_an_interrupted_run_does_not_wait_for_a_server(monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.2)
    answered = threading.Event()

    def batches():
        yield SimpleNamespace(_replace=lambda waited: waited)
        answered.wait(600)

    with closing(prefetch_to_device(batches(), lambda _: np.zeros(1))) as fed:
        next(fed)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    answered.set()


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ({}, [2.0, 2.0, 2.0]),
        ({"warmup_steps": 4}, [0.5, 2.0, 2.0]),
        ({"schedule": "linear", "decay_steps": 10}, [2.0, 1.2, 0.0]),
        ({"schedule": "cosine", "decay_steps": 10}, [2.0, 1 + math.cos(0.4 * math.pi), 0.0]),
        ({"schedule": "linear", "warmup_steps": 2, "decay_steps": 10}, [1.0, 1.5, 0.0]),
    ],
)
def test_schedules(how, want):
    rate = learning_rate(OptimizerConfig("adamw", lr=2.0, **how))
    np.testing.assert_allclose([float(rate(step)) for step in (0, 4, 10)], want, atol=1e-6)


def test_a_schedule_needs_its_end():
    with pytest.raises(InputError, match="decay_steps"):
        OptimizerConfig("adamw", schedule="cosine")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.max_sequence_length", "0"),
        ("train.max_sequence_length", "-3"),
        ("train.seed", str(2**32)),
        ("lora.alpha", "0"),
        ("lora.alpha", "-1.5"),
        ("lora.alpha", ".nan"),
        ("lora.alpha", ".inf"),
        ("lora.rank", "0"),
        ("validation.num_inference_steps", "0"),
        ("validation.guidance_scale", ".nan"),
        ("validation.guidance_scale", "-1"),
        ("validation.seed", str(10**23)),
        ("validation.every", "0"),
        ("logging.peak_tflops", "-1"),
        ("logging.peak_tflops", ".nan"),
        ("logging.every", "0"),
        ("data.workers", "-1"),
        ("out", ""),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_loaded(setting, value):
    argv = ["--model=m", "--data.path=s", "--out=o", f"--{setting}={value}"]
    with pytest.raises(InputError, match=rf"^(--)?{setting} is (-?[\d.]+|nan|inf|empty): "):
        cli.run_command(cli.Command((CorrectorRunConfig,), lambda _: None), argv)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_the_strength_of_a_lora_on_a_language_model(alpha):
    with pytest.raises(InputError, match=f"^lora.alpha is {alpha}: give a number above 0"):
        QwenLoraConfig(alpha=alpha)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("corrector_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_read_again_as_it_was_resolved(recipe, tmp_path):
    config = read(recipe)
    write_config(tmp_path, asdict(config))
    assert read(tmp_path / CONFIG) == config
    assert recipe.read_text().startswith("# ")
    assert f"--config configs/{recipe.name}" in recipe.read_text()


def read(file: Path) -> CorrectorRunConfig:
    found: list[CorrectorRunConfig] = []
    cli.run_command(cli.Command((CorrectorRunConfig,), found.append), ["--config", str(file)])
    return found[0]
