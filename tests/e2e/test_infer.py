"""``infer.py`` as a user runs it: a process, a model, and a server where things go wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.openai_server import KEY, Fault, OpenAIServer, score_of, sentence_of

ROOT = Path(__file__).parents[2]
DEBUG = ["--config", "configs/debug.yaml", "--prompts", "configs/prompts_debug.jsonl"]
MODEL = ["--model=tests/golden/pipeline", "--dtype=float32"]


def infer(*argv: object, server: OpenAIServer | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XLA_FLAGS": ""} | (server.environment if server else {})
    command = [sys.executable, "infer.py", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def first_image_of(words: str):
    """Matches every grading of the first image that is graded for a prompt with these words."""
    victims: list[bytes] = []

    def matches(call) -> bool:
        if call.role != "verify" or words not in call.text:
            return False
        victims.append(call.image)
        return call.image == victims[0]

    return matches


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One reflection search of three prompts under faults; one grading fails for good, and so do one prompt's texts."""
    out = tmp_path_factory.mktemp("reflect") / "run"
    faults = [
        Fault("reorder", seconds=0.01),
        Fault("status", status=429, retry_after=0.1, times=2),
        Fault("drop", times=1),
        Fault("truncated", when=lambda call: call.role == "verify", times=2),
        Fault("refusal", when=first_image_of("three kites")),
        Fault("status", status=400, when=lambda call: call.role == "write" and "orange teapot" in call.text),
    ]
    with OpenAIServer(faults) as server:
        done = infer(
            "reflect",
            *DEBUG,
            "--out",
            out,
            "--end=3",
            "--verifier.max_retries=8",
            "--settings.num_inference_steps=2",
            server=server,
        )
        assert done.returncode == 0, done.stderr
        records = {
            index: [json.loads(line) for line in (out / f"{index:05d}/records.jsonl").read_text().splitlines()]
            for index in range(3)
        }
        yield out, records, server.calls, done


def test_every_score_belongs_to_its_image_whatever_went_wrong(run):
    out, records, _, done = run
    unscored = []
    for index, prompt in records.items():
        assert len(prompt) == 8
        for record in prompt:
            image = (out / f"{index:05d}" / record["file"]).read_bytes()
            if record["verdict"]["score"] is None:
                unscored.append((index, record["verdict"]["error"]))
            else:
                assert record["verdict"]["score"] == score_of(image)
    assert unscored == [(1, "the model refused: I cannot help with that.")]
    assert "3 prompts, 24 images, 23 scored, 1 without a score, 8 texts failed" in done.stdout


def test_texts_belong_to_their_images_and_failures_are_recorded(run):
    out, records, calls, _ = run
    written = {sentence_of(call.image, call.text): call for call in calls if call.role == "write"}
    for index, prompt in records.items():
        for record in prompt[4:]:
            parent = (out / f"{index:05d}" / record["parent_file"]).read_bytes()
            if index == 2:
                assert record["reflection"] == ""
                assert record["refined_prompt"] is None
                assert len(record["text_errors"]) == 2
            else:
                assert written[record["reflection"]].image == written[record["refined_prompt"]].image == parent
                assert record["text_errors"] == []


def test_layout_and_best(run):
    out, records, _, _ = run
    for index, prompt in records.items():
        folder = out / f"{index:05d}"
        counts = {name: len(list((folder / name).glob("*.png"))) for name in os.listdir(folder) if "." not in name}
        assert counts == {
            "midimg": 8, "samples": 4, "samples_lastround": 2, "samples_path_bestround": 2, "samples_best": 1,
        }  # fmt: skip
        best = max((r["verdict"]["score"], r["file"]) for r in prompt if r["verdict"]["score"] is not None)
        assert (folder / "samples_best/00000.png").read_bytes() == (folder / best[1]).read_bytes()


def test_no_secret_is_written(run):
    out, _, _, done = run
    assert KEY not in done.stdout + done.stderr
    assert not any(KEY.encode() in file.read_bytes() for file in out.rglob("*") if file.is_file())


def test_a_second_run_does_not_mix_with_the_first(run):
    out, *_ = run
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    with OpenAIServer() as server:
        done = infer("reflect", *DEBUG, "--out", out, server=server)
    assert done.returncode == 2
    assert done.stderr == f"error: {out}: holds files of another run; give an empty or new folder as --out\n"
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}


def test_generate_makes_an_image_of_the_search_again_from_its_record(run, tmp_path):
    """Same seed, same image: alone in its batch, in another process, by the command line's flags."""
    out, records, *_ = run
    corrected = records[0][4]
    settings = corrected["settings"].items()
    flags = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings]
    texts = [f"--{name}={corrected[name]}" for name in ("prompt", "reflection", "refined_prompt", "lora")]
    seed = "-".join(map(str, corrected["seed"]))
    condition = out / "00000" / corrected["parent_file"]
    done = infer("generate", *MODEL, *flags, *texts, "--condition", condition, "--seed", seed, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"seed_{seed}.png").read_bytes() == (out / "00000" / corrected["file"]).read_bytes()


def test_a_lora_that_could_have_no_effect_is_one_line(tmp_path):
    lora = "--lora=tests/golden/lora/pytorch_lora_weights.safetensors"
    done = infer("generate", *MODEL, lora, "--prompt=x", "--height=64", "--width=64", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the LoRA acts on condition tokens only")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_runs_a_command_against_a_server_of_its_own():
    code = "import os, sys; sys.exit(7 if os.environ['OPENAI_BASE_URL'].startswith('http://127.0.0.1') else 1)"
    command = [sys.executable, "-m", "tests.kit.openai_server", "--", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 7
