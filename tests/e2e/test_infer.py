"""``infer.py`` as a user runs it: a process, a model, and a server where things go wrong."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from rflow_jax.testing.openai_server import KEY, Fault, OpenAIServer, score_of, sentence_of
from tests.kit.processes import run as run_process

ROOT = Path(__file__).parents[2]
DEBUG = ["--config", "configs/debug.yaml", "--prompts", "configs/prompts_debug.jsonl"]
MODEL = ["--model=tests/golden/pipeline", "--dtype=float32"]


def infer(*argv: object, server: OpenAIServer | None = None) -> subprocess.CompletedProcess[str]:
    return run_process(["infer.py", *argv], server.environment if server else {})


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
            "--sampling.num_inference_steps=2",
            server=server,
        )
        assert done.returncode == 1, done.stderr
        records = {
            index: [json.loads(line) for line in (out / f"{index:05d}/records.jsonl").open()] for index in range(3)
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
    ((index, error),) = unscored
    assert index == 1
    assert error.startswith("the model refused: I cannot help with that.")
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


def test_a_second_run_on_a_finished_folder_does_nothing_and_says_so(run):
    out, *_ = run
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    command = ["reflect", *DEBUG, "--out", out, "--end=3", "--sampling.num_inference_steps=2"]
    with OpenAIServer() as server:
        done = infer(*command, "--verifier.max_retries=1", server=server)
        assert server.calls == []
        lacking = "1 without a score, 8 texts failed (their records say why)"
        assert done.stdout == f"{out}: all 3 prompts are done, {lacking}; nothing to do\n", done.stderr
        assert done.returncode == 1
        other = infer(*command, "--seed=1", server=server)
    assert other.returncode == 2
    assert other.stderr.startswith(f"error: {out}: contains another search: seed is 0 there and 1 now")
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*")}


def test_filter_chooses_the_best_of_the_first_images(run, tmp_path):
    finished, records, *_ = run
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    done = infer("filter", out, "--k=[1,3,32]")
    assert (done.returncode, done.stdout) == (0, f"{out}: nfe1, nfe3, nfe32 of 3 prompts\n"), done.stderr
    for index, prompt in records.items():
        for k in (1, 3, 32):
            scored = [record for record in prompt[:k] if record["verdict"]["score"] is not None]
            best = max(scored, key=lambda record: record["verdict"]["score"]) if scored else prompt[0]
            chosen = (out / f"{index:05d}/nfe{k}/00000.png").read_bytes()
            assert chosen == (out / f"{index:05d}" / best["file"]).read_bytes()


def test_two_processes_share_a_run_and_reflect_begins_with_its_images(tmp_path):
    noise, out = tmp_path / "noise", tmp_path / "reflect"
    more = ["--end=3", "--noise.search_rounds=1", "--sampling.num_inference_steps=1", "--sampling.batch_size=2"]
    with OpenAIServer() as server:
        with ThreadPoolExecutor(2) as together:
            shares = [["--process_count=2", f"--process_index={number}"] for number in range(2)]
            every = list(
                together.map(lambda s: infer("noise", *DEBUG, *more, "--out", noise, *s, server=server), shares)
            )
        for done, count in zip(every, ("2 prompts, 4 images, 4", "1 prompt, 2 images, 2"), strict=True):
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"{count} scored")
        assert sorted(child.name for child in noise.iterdir()) == [
            "00000", "00001", "00002", "config.yaml", "usage.json", "usage_1.json"
        ]  # fmt: skip
        more += ["--start=1", "--reflect.search_rounds=1", "--images", noise, "--out", out]
        done = infer("reflect", *DEBUG, *more, server=server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 prompts, 4 images, 8 scored")
    for index in (1, 2):
        records = [json.loads(line) for line in (out / f"{index:05d}/records.jsonl").open()]
        assert [record["stage"] for record in records] == ["given", "given", "reflect", "reflect"]
        for number in range(2):
            name = f"{index:05d}/samples/{number:05d}.png"
            assert (out / name).read_bytes() == (noise / name).read_bytes()


def test_noise_prompt_refines_each_branch(tmp_path):
    more = ["--end=1", "--sampling.num_inference_steps=1", "--out", tmp_path / "run"]
    with OpenAIServer() as server:
        done = infer("noise-prompt", *DEBUG, *more, server=server)
        written = {sentence_of(call.image, call.text): call for call in server.calls if call.role == "write"}
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 prompt, 4 images, 4 scored")
    records = [json.loads(line) for line in (tmp_path / "run/00000/records.jsonl").open()]
    assert [(record["parent"], record["refined_prompt"] is None) for record in records] == [
        (None, True), (None, True), (0, False), (1, False)
    ]  # fmt: skip
    for record in records[2:]:
        parent = (tmp_path / "run/00000" / record["parent_file"]).read_bytes()
        assert written[record["refined_prompt"]].image == parent


def test_pairs_are_corrected_beside_the_good_ones(tmp_path):
    entries = []
    for number in range(3):
        names = {kind: f"{kind}{number}.png" for kind in ("bad", "good")}
        for shade, name in enumerate(names.values()):
            Image.new("RGB", (80, 64), (70 * number, 90 * shade, 20)).save(tmp_path / name)
        texts = {"prompt": f"prompt {number}", "instruction": "add a cat"}
        entries.append({"bad_image": names["bad"], "good_image": names["good"], **texts})
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    lora = "--lora=tests/golden/lora/pytorch_lora_weights.safetensors"
    small = ["--height=64", "--width=64", "--condition_size=32", "--num_inference_steps=1", "--batch_size=2"]
    command = ["pairs", tmp_path / "pairs.json", *MODEL, lora, *small, "--max_sequence_length=64", "--out"]
    done = infer(*command, tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, f"3 pairs in {tmp_path / 'out'}\n"), done.stderr
    for number in range(3):
        with Image.open(tmp_path / f"out/{number:05d}.png") as row:
            assert row.size == (192, 64)
            assert row.getpixel((100, 32)) == (70 * number, 90, 20)
            made = row.crop((128, 0, 192, 64))
        with Image.open(tmp_path / f"out/generated/{number:05d}.png") as image:
            assert image.tobytes() == made.tobytes()
    again = infer(*command, tmp_path / "out")
    assert again.stdout == f"{tmp_path / 'out'}: all 3 pairs are done; nothing to do\n"


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
    command = [sys.executable, "-m", "rflow_jax.testing.openai_server", "--", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 7
