"""Searches without any HTTP call: judges and writers in the same process, with tiny models."""

import json
import math
import subprocess
from pathlib import Path

import PIL.Image
import pytest

from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.config import RewardVerifierConfig
from tests.kit.processes import run

ROOT = Path(__file__).parents[2]
DEBUG = ["--config=configs/debug.yaml", "--prompts=configs/prompts_debug.jsonl", "--end=2"]
QUICK = ["--noise.search_rounds=1", "--reflect.search_rounds=1", "--sampling.num_inference_steps=1"]
REWARD = ["--verifier.name=reward", "--verifier.model=tests/golden/qwen/reward"]
BATCHES = '{"batch_size": 2, "dtype": "float32"}'


def options(role: str, **more: object) -> list[str]:
    return [f"--{role}.options={json.dumps(json.loads(BATCHES) | more)}"]


def qwen(role: str) -> list[str]:
    return [f"--{role}.name=qwen", f"--{role}.model=tests/golden/qwen/base", *options(role, max_new_tokens=6)]


def infer(*argv: object) -> subprocess.CompletedProcess[str]:
    # An address where nobody answers, and no key: whoever asked it would be told in the records.
    return run(["infer.py", *argv], {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})


def records(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("*/records.jsonl")) for line in path.open()]


def test_the_whole_loop_runs_in_one_process(tmp_path):
    roles = [*REWARD, *options("verifier"), *qwen("reflector"), *qwen("refiner")]
    done = infer("reflect", *DEBUG, *QUICK, *roles, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = records(tmp_path / "run")
    assert len(found) == 8
    config = RewardVerifierConfig(str(ROOT / "tests/golden/qwen/reward"), **json.loads(BATCHES))
    verifier = make_verifier(config)
    assert verifier is not None
    for record in found:
        assert record["text_errors"] == []
        with PIL.Image.open(tmp_path / "run" / f"{record['index']:05d}" / record["file"]) as image:
            (verdict,) = verifier.score([image], [{"prompt": record["prompt"]}])  # alone, and not in its batch
        assert record["verdict"]["score"] == pytest.approx(verdict.score, rel=1e-4, abs=1e-4)
    assert all(record["reflection"] and record["refined_prompt"] for record in found if record["stage"] == "reflect")
    assert {record["models"]["reflector"] for record in found} == {"qwen base"}


def test_nvila_judges_in_this_process(tmp_path):
    roles = ["--verifier.name=nvila", "--verifier.model=tests/golden/nvila/checkpoint", *options("verifier")]
    done = infer("noise", *DEBUG, *QUICK, *roles, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = records(tmp_path / "run")
    assert len(found) == 4
    for verdict in (record["verdict"] for record in found):
        assert verdict["label"] in ("yes", "no")
        assert verdict["score"] == max(verdict["raw"]["yes"], verdict["raw"]["no"])
        assert math.isfinite(verdict["score"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (['--verifier.options={"batchsize": 2}'], "unknown key verifier.batchsize: did you mean verifier.batch_size?"),
        (
            ['--verifier.options={"batch_size": "many"}'],
            "verifier.batch_size: Input should be a valid int",
        ),
        (['--verifier.options={"batch_size": 0}'], "batch_size is 0"),
        (["--verifier.model=tests/golden/pipeline"], "tests/golden/pipeline"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, words):
    done = infer("noise", *DEBUG, *REWARD, *flags, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
