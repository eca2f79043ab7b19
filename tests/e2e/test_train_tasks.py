"""``train.py`` with tasks other than the corrector, as a user runs them."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rflow_jax.testing.make_genref import make_genref
from rflow_jax.verifiers.config import RewardVerifierConfig
from rflow_jax.verifiers.reward import RewardVerifier
from tests.kit.chats import make_chats
from tests.kit.preferences import make_pairs
from tests.kit.processes import Process, xla_flags

AS_USUAL = " --xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false"
LIMIT = 400  # seconds that a run may take on a slow machine
TIMINGS = {"samples_per_s", "data_wait", "skipped", "mfu"}


class Place:
    """Runs in one folder."""

    def __init__(self, root: Path):
        self.root = root

    def start(self, config: str, out: str, *flags: str, environment: Mapping[str, str] = {}) -> Process:
        argv = ["train.py", "--config", f"configs/{config}.yaml", "--out", self.root / out, *flags]
        return Process(argv, environment, merged=True)

    def run(self, config: str, out: str, *flags: str, environment: Mapping[str, str] = {}) -> tuple[int | None, str]:
        process = self.start(config, out, *flags, environment=environment)
        text, _ = process.communicate(timeout=LIMIT)
        return process.returncode, text

    def lines(self, out: str) -> list[dict[str, Any]]:
        file = self.root / out / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def steps(self, out: str) -> list[dict[str, Any]]:
        """The numbers of each step, without what depends on the clock."""
        steps = [line for line in self.lines(out) if "loss" in line]
        return [{key: line[key] for key in line.keys() - TIMINGS} for line in steps]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def pairs(place) -> Path:
    (place.root / "pairs").mkdir()
    return make_pairs(place.root / "pairs", 40)


def flags_of(pairs: Path, steps: int) -> list[str]:
    return [
        *("--data.pairs", str(pairs), "--data.path", "null", "--validation.path", "null"),
        *("--reward.normalise", "false", "--train.batch_size", "4", "--train.steps", str(steps)),
        *("--logging.every", "1", "--optimizer.decay_steps", "4", "--logging.tensorboard", "false"),
    ]


def test_reward_training_tells_preferences_of_held_out_pairs(place):
    """95 % of pairs that were never trained on."""
    make_genref(place.root / "genref", shards=20, samples=160)
    shards = str(place.root / "genref" / "{000..018}.tar")
    held_out = str(place.root / "genref" / "019.tar")
    flags = ["--data.path", shards, "--validation.path", held_out, "--train.steps", "150"]
    quick = {"XLA_FLAGS": xla_flags() + AS_USUAL}  # it runs for longer than it compiles
    status, text = place.run("reward_debug", "learned", *flags, environment=quick)
    assert status == 0, text
    accuracy = {
        line["step"]: line["validation/accuracy"] for line in place.lines("learned") if "validation/loss" in line
    }
    assert accuracy[0] < 0.7
    assert accuracy[150] >= 0.95
    folder = place.root / "learned" / "reward"
    assert {path.name for path in folder.iterdir()} >= {"model_config.json", "checkpoint-150"}
    RewardVerifier(RewardVerifierConfig(str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def whole(place, pairs) -> list[dict[str, Any]]:
    """The numbers of four steps at once."""
    status, text = place.run("reward_debug", "whole", *flags_of(pairs, 4))
    assert status == 0, text
    return place.steps("whole")


def test_two_steps_and_two_more_are_four(place, pairs, whole):
    assert place.run("reward_debug", "parts", *flags_of(pairs, 2))[0] == 0
    shutil.rmtree(place.root / "parts" / "reward")  # as if it had been killed before the export
    status, text = place.run("reward_debug", "parts", *flags_of(pairs, 4), "--resume")
    assert status == 0, text
    assert "step 2 of 4" in text
    assert len(whole) == 4
    assert place.steps("parts") == whole
    assert {path.name for path in (place.root / "parts" / "reward").glob("*-*")} == {"checkpoint-2", "checkpoint-4"}


def test_sigterm_saves_and_the_run_goes_on(place, pairs):
    many = flags_of(pairs, 2000)
    process = place.start("reward_debug", "stopped", *many)
    until = time.monotonic() + LIMIT
    while not place.steps("stopped") and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, text
    assert "stopped by SIGTERM" in text
    reached = len(place.steps("stopped"))
    assert 1 <= reached < 2000
    assert (place.root / "stopped" / "checkpoints" / str(reached)).is_dir()
    assert (place.root / "stopped" / "reward" / f"checkpoint-{reached}").is_dir()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "rewards"], ["'rewards'", "did you mean reward?"]),
        (["--reward.los", "bt"], ["reward.los", "did you mean reward.loss?"]),
        (["--reward.loss", "bradley"], ["reward.loss"]),
        (["--model", "/nowhere"], ["/nowhere"]),
        (["--data.pairs", "/nowhere.jsonl"], ["/nowhere.jsonl"]),
        (["--lora.target_modules", "nothing"], ["nothing"]),
        (["--train.batch_size", "3", "--train.gradient_accumulation_steps", "2"], ["multiple of 2"]),
    ],
    ids=["task", "key", "loss", "model", "pairs", "pattern", "batch"],
)
def test_bad_input_is_one_line(place, pairs, flags, words):
    status, text = place.run("reward_debug", "bad", *flags_of(pairs, 4), *flags)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2, text
    assert len(errors) == 1, text
    assert "Traceback" not in text
    assert all(word in errors[0] for word in words), errors


def test_a_checkpoint_of_other_settings_is_refused(place, pairs, whole):
    for flag, value in (("--reward.loss", "btt"), ("--data.max_tokens", "80"), ("--lora.rank", "3")):
        status, text = place.run("reward_debug", "whole", *flags_of(pairs, 5), "--resume", "true", flag, value)
        assert status == 2, text
        assert flag.removeprefix("--") in text


@pytest.fixture(scope="module")
def chats(place) -> list[str]:
    (place.root / "chats").mkdir()
    file = str(make_chats(place.root / "chats"))
    small = ["--data.max_images", "2", "--train.batch_size", "2"]
    small += ["--logging.every", "1", "--logging.tensorboard", "false"]
    return ["--data.chats", file, "--validation.chats", file, *small]


def test_fine_tuning_stopped_and_resumed_is_fine_tuning_at_once(place, chats):
    status, text = place.run("sft_debug", "sft", *chats, "--train.steps", "4")
    assert status == 0, text
    tried = [line["validation/loss"] for line in place.lines("sft") if "validation/loss" in line]
    assert len(tried) == 2
    assert tried[1] < tried[0]
    assert (place.root / "sft" / "adapter" / "4" / "adapter_model.safetensors").is_file()
    assert place.run("sft_debug", "sft_parts", *chats, "--train.steps", "2")[0] == 0
    status, text = place.run("sft_debug", "sft_parts", *chats, "--train.steps", "4", "--resume", "true")
    assert status == 0, text
    assert place.steps("sft_parts") == place.steps("sft")


def test_a_chat_that_is_not_usable_is_named(place, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    status, text = place.run("sft_debug", "bad_chats", "--data.chats", str(tmp_path / "chats.jsonl"))
    assert status == 2, text
    assert "chats.jsonl:1: no message of the assistant" in text
    assert "Traceback" not in text
