"""``train.py`` as a user runs it: killed, stopped, resumed, on several processes, and told nonsense."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sources.open import open_loader
from rflow_jax.generation.pipeline import load_pipeline
from rflow_jax.testing.make_genref import make_genref
from tests.kit.processes import Process, run, xla_flags

UNTRIED = ("--validation.path", "null")  # a run without validation trains alike, and in half the time
STEPS, TIMINGS = 20, {"samples_per_s", "data_wait", "skipped", "mfu"}
LIMIT = 300  # seconds that a run may take on a slow machine


class Place:
    """Shards, and the runs that train on them."""

    def __init__(self, root: Path):
        self.root, self.shards = root, root / "genref"
        make_genref(self.shards, shards=3)

    def start(self, out: str, *flags: str, devices: int = 1) -> Process:
        argv = [
            *("train.py", "--config", "configs/corrector_debug.yaml"),
            *("--data.path", f"{self.shards}/{{000..001}}.tar", "--validation.path", f"{self.shards}/002.tar"),
            *("--out", self.root / out, "--data.cache", self.root / "index", *flags),
        ]
        return Process(argv, {"XLA_FLAGS": xla_flags(devices)}, merged=True)

    def run(self, out: str, *flags: str, devices: int = 1) -> tuple[int | None, str]:
        return ended(self.start(out, *flags, devices=devices))

    def steps(self, out: str) -> dict[int, dict[str, Any]]:
        """step -> its numbers, without what depends on the clock."""
        file = self.root / out / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        steps = [line for line in lines if "loss" in line]
        assert len({line["step"] for line in steps}) == len(steps), "a step is there twice"
        return {line["step"]: {key: line[key] for key in line.keys() - TIMINGS} for line in steps}

    def wait_for_step(self, process: Process, out: str, step: int) -> None:
        until = time.monotonic() + LIMIT
        file = self.root / out / "metrics.jsonl"
        while process.poll() is None and time.monotonic() < until:
            if file.exists() and f'"step": {step},' in file.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def ended(process: Process) -> tuple[int | None, str]:
    """Exit status and output, once it ended."""
    text, _ = process.communicate(timeout=LIMIT)
    return process.returncode, text


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole(place) -> dict[int, dict[str, Any]]:
    """A run that nothing happens to."""
    status, text = place.run("whole")
    assert status == 0, text
    return place.steps("whole")


def test_a_run_leaves_what_it_promises(place, whole):
    out = place.root / "whole"
    assert list(whole) == list(range(1, STEPS + 1))
    assert sorted(int(f.name) for f in (out / "checkpoints").iterdir() if f.name.isdigit()) == [15, 20]
    assert {f.name for f in (out / "lora").iterdir()} == {"15", "20"}
    assert any((out / "tensorboard").iterdir())
    assert (out / "config.yaml").exists()
    assert sum(whole[STEPS]["drawn"].values()) == STEPS * 4
    pictures = sorted((out / "validation" / "0000020").iterdir())
    assert [p.name for p in pictures] == [f"{name}_0.png" for name in ("editing", "general", "length", "rule")]
    assert Image.open(pictures[0]).size == (3 * 64, 64)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tried = [line["step"] for line in lines if "validation/all" in line]
    assert tried == [0, 10, 20]
    assert {"validation/general", "validation/editing"} <= lines[0].keys()


def test_the_exported_lora_generates(place, whole):
    lora = place.root / "whole" / "lora" / str(STEPS)
    pipe = load_pipeline("tests/golden/pipeline", lora=str(lora), dtype="float32", progress=False)
    assert len(pipe.bundle.lora_paths) > 10


def test_killed_stopped_and_damaged_it_does_what_it_would_have_done(place, whole):
    """Killed twice at random, stopped by SIGTERM, and its newest checkpoint damaged."""
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    print("seed", seed)
    assert place.run("killed", "--data.path", "/nowhere/*.tar")[0] == 2  # which leaves nothing in the way
    reached = []
    for signal_number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        flags = UNTRIED if signal_number == signal.SIGKILL else ()
        process = place.start("killed", "--resume", "true", *flags)
        # Killed somewhere in the loop, or while a checkpoint is being written; stopped in the loop, which saves one.
        begun = max(place.steps("killed") or [0])
        step = begun + 1 if signal_number == signal.SIGTERM else begun // 5 * 5 + chance.randint(1, 6)
        place.wait_for_step(process, "killed", min(step, STEPS - 1))
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(signal_number)
        text, _ = process.communicate(timeout=LIMIT)
        reached.append(max(place.steps("killed")))
    assert process.returncode == 0, text
    assert f"step {reached[-1]} is saved" in text or reached[-1] == STEPS
    newest = place.root / "killed" / "checkpoints" / str(reached[-1])
    file = random.Random(0).choice(sorted(f for f in newest.rglob("*") if f.is_file() and f.stat().st_size > 8))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status, text = place.run("killed", "--resume", "true")
    assert status == 0, text
    assert "going back to the checkpoint before it" in text
    assert (place.root / "killed" / f"damaged_{reached[-1]}").is_dir()
    assert place.steps("killed") == whole, reached


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for two checkpoints and no third."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(place, whole, small_disk):
    out = small_disk / "run"
    status, text = place.run(str(out), "--checkpoint.keep_every", "5", "--logging.tensorboard", "false", *UNTRIED)
    assert status == 1, text
    assert "Traceback" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("error: "))
    assert "the disk is full" in line
    newest = int(line.partition("newest whole checkpoint is of step ")[2].partition(";")[0])
    subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
    status, text = place.run(str(out), "--resume", "true", *UNTRIED)
    assert status == 0, text
    assert f"step {newest} of {STEPS}" in text
    assert place.steps(str(out)) == whole


def test_latents_made_before_give_the_losses_of_pictures(place):
    latents = place.root / "latents"
    sizes = ["--data.target_size", "64", "--data.condition_size", "32", "--data.crop", "center"]
    command = ["infer.py", "data", "precompute", "--model", "tests/golden/pipeline", "--dtype", "float32", *sizes]
    command += ["--data.path", f"{place.shards}/{{000..001}}.tar", "--data.workers", "0"]
    command += ["--max_sequence_length", "64", str(latents)]
    made = run(command)
    assert made.returncode == 0, made.stderr
    how = ["--data.crop", "center", "--train.steps", "6", *UNTRIED]
    status, text = place.run("of_pictures", *how)
    assert status == 0, text
    how += ["--data.format", "precomputed", "--data.path", str(latents)]
    status, text = place.run("of_latents", *how, "--train.steps", "4")
    assert status == 0, text
    status, text = place.run("of_latents", *how, "--resume", "true")
    assert status == 0, text
    found, want = place.steps("of_latents"), place.steps("of_pictures")
    assert [line.pop("samples") for line in found.values()] != [line.pop("samples") for line in want.values()]
    assert found == want
    status, text = place.run("other_latents", *how, "--train.max_sequence_length", "32")
    assert status == 2, text
    assert "made with text_length 64, not 32" in text


def two_processes(place: Place, out: str, *flags: str, devices: int = 1) -> list[tuple[int | None, str]]:
    """(exit status, output) of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags += ("--distributed.enabled", "true", "--distributed.num_processes", "2")
    flags += ("--distributed.coordinator", f"localhost:{port}")
    both = [place.start(out, *flags, "--distributed.process_id", str(i), devices=devices) for i in range(2)]
    return [ended(process) for process in both]


def test_two_processes_give_the_losses_of_one(place, whole):
    for last in ("5", "10"):
        how = ["--mesh.fsdp", "2", "--train.steps", last, *UNTRIED, "--resume", "true"]
        told = two_processes(place, "two", *how, devices=2)
        assert [status for status, _ in told] == [0, 0], told
    steps = place.steps("two")
    assert list(steps) == list(range(1, 11))
    for step, line in steps.items():
        assert line["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5)
        assert line["drawn"] == whole[step]["drawn"]
    begun = time.monotonic()
    told = two_processes(place, "two", "--mesh.fsdp", "2", devices=2)  # without --resume
    assert [status for status, _ in told] == [2, 2], told
    assert all("contains files already; add --resume" in text and "Traceback" not in text for _, text in told)
    assert time.monotonic() - begun < 0.5 * LIMIT


def test_a_stream_in_two_processes_goes_on_where_both_stood(place):
    how = ["--data.format", "stream", "--data.shuffle_buffer_size", "4"]
    for last in ("3", "6"):
        told = two_processes(place, "streamed", *how, *UNTRIED, "--resume", "true", "--train.steps", last)
        assert [status for status, _ in told] == [0, 0], told
    settings = yaml.safe_load(Path("configs/corrector_debug.yaml").read_text())["data"]
    settings |= {"path": f"{place.shards}/{{000..001}}.tar", "format": "stream", "shuffle_buffer_size": 4}
    drawn: Counter[str] = Counter()
    samples = []
    for slots in ([0, 1], [2, 3]):
        with open_loader(DataConfig(**settings), seed=0, batch_size=4, slots=slots) as loader:
            batches = list(islice(loader, 6))
        drawn.update(subset for batch in batches for subset in batch.subsets)
        samples.append([batch.digest for batch in batches])
    steps = place.steps("streamed")
    assert [line["samples"] for line in steps.values()] == samples[0]  # those of the first process
    assert steps[6]["drawn"] == {name: drawn[name] for name in SUBSETS}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.path", "/nowhere/*.tar"], ["/nowhere/*.tar", "no shard matches"]),
        (["--data.split_ratios", "{generel: [1, 1]}"], ["generel", "did you mean general?"]),
        (["--mesh.fsdp", "3"], ["mesh", "does not divide 1 device"]),
        (["--train.batchsize", "8"], ["train.batchsize", "did you mean train.batch_size?"]),
        (["--train.gradient_accumulation_steps", "3"], ["train.batch_size", "multiple of 3"]),
        (["--data.target_size", "70"], ["data.target_size", "multiple of"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["--lora.target_modules", "nothing"], ["nothing"]),
    ],
    ids=["shards", "subset", "mesh", "key", "batch", "size", "model", "pattern"],
)
def test_bad_input_is_one_line(place, flags, words):
    status, text = place.run("bad", *flags)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2, text
    assert len(lines) == 1, text
    assert "Traceback" not in text
    assert all(word in lines[0] for word in words), lines


def test_a_checkpoint_of_another_model_is_refused(place, whole):
    status, text = place.run("whole", "--resume", "true", "--lora.rank", "8")
    assert status == 2, text
    assert "lora.rank" in text
    assert place.steps("whole") == whole


def test_a_folder_in_use_is_refused(place, whole):
    status, text = place.run("whole")
    assert status == 2, text
    assert "--resume" in text
