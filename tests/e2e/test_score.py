"""``rflow score`` as a user calls it: models in this process, and a local HTTP server."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import PIL.Image
import pytest

from rflow_jax.testing.openai_server import Fault, OpenAIServer, score_of
from tests.kit.asking import pictures
from tests.kit.clip import make_clip
from tests.kit.processes import Process
from tests.kit.processes import run as run_process

ROOT = Path(__file__).parents[2]
OPTIONS = '--verifier.options={"batch_size": 2, "dtype": "float32"}'
REWARD = ["--verifier.name=reward", "--verifier.model=tests/golden/qwen/reward", OPTIONS]
NOWHERE = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}


def score(*argv: object, environment: dict[str, str] = NOWHERE) -> subprocess.CompletedProcess[str]:
    return run_process(["infer.py", "score", *argv], environment)


def table(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    return {fields[2]: fields for fields in (line.split("\t") for line in done.stdout.splitlines())}


@pytest.fixture
def run(tmp_path):
    """A folder of four prompts, three images each."""
    for number, image in enumerate(pictures(12, seed=3)):
        prompt = tmp_path / f"run/{number // 3:05d}"
        (prompt / "samples").mkdir(parents=True, exist_ok=True)
        (prompt / "metadata.jsonl").write_text(json.dumps({"prompt": f"a photo of {number // 3} kites"}) + "\n")
        image.resize((64, 64)).save(prompt / f"samples/{number % 3:05d}.png")
    return tmp_path / "run"


def clip(folder: Path) -> list[str]:
    model = make_clip(folder / "clip", ROOT / "tests/golden")
    return ["--verifier.name=clip", f"--verifier.model={model}", OPTIONS]


@pytest.mark.parametrize("name", ["reward", "clip"])
def test_a_bad_image_and_a_bad_prompt_change_no_other_score(run, tmp_path, name):
    verifier = REWARD if name == "reward" else clip(tmp_path)
    whole = score(run, *verifier)
    assert whole.returncode == 0, whole.stderr
    cut = run / "00000/samples/00001.png"
    cut.write_bytes(cut.read_bytes()[:-500])
    (run / "00001/metadata.jsonl").write_text(json.dumps({"prompt": "word " * 5000}))
    (run / "00002/metadata.jsonl").write_text("{}")
    done = score(run, *verifier, "--out", tmp_path / "o.jsonl")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    want, found = table(whole), table(done)
    assert len(want) == len(found) == 12
    reasons = {path: fields[3] for path, fields in found.items() if len(fields) == 4}
    assert "cannot be decoded" in reasons.pop(str(cut))
    assert {Path(path).parts[-3] for path in reasons} == {"00001", "00002"}
    for path, reason in reasons.items():
        assert ("too long" if "/00001/" in path else "no prompt") in reason
    scored = [path for path, fields in found.items() if len(fields) == 3]
    assert len(scored) == 5
    for path in scored:
        assert float(found[path][0]) == pytest.approx(float(want[path][0]), rel=1e-4, abs=1e-4)
    assert "5 of 12 images scored, mean " in done.stderr
    # Only what has no score yet is asked again: one image could be scored by now.
    shutil.copy(run / "00000/samples/00002.png", cut)
    again = score(run, *verifier, "--out", tmp_path / "o.jsonl")
    assert table(again)[str(cut)][0] == found[str(run / "00000/samples/00002.png")][0]


def test_an_endpoint_grades_many_images_at_once(run, tmp_path):
    with OpenAIServer(delay=0.2) as server:
        flags = ["--no-probe", "--verifier.concurrency=6", "--verifier.price_input=1", "--verifier.price_output=1"]
        done = score(run, *flags, "--out", tmp_path / "o.jsonl", environment=server.environment)
        assert done.returncode == 0, done.stderr
        assert 3 <= server.most_at_once <= 6
        found = table(done)
        shown = {call.images[0]: call.text for call in server.calls}
        assert {float(fields[0]) for fields in found.values()} == {round(score_of(image), 6) for image in shown}
        assert all(any(f"{number} kites" in text for text in shown.values()) for number in range(4))
        assert "12 questions" in done.stderr
        assert "($0.0" in done.stderr
        again = score(run, *flags, "--out", tmp_path / "o.jsonl", environment=server.environment)
        assert again.stdout == done.stdout
        assert len(server.calls) == 12


def test_an_image_that_the_endpoint_refuses_says_why(run):
    broken = [Fault("refusal", when=lambda call: "2 kites" in call.text)]
    with OpenAIServer(broken) as server:
        done = score(run, "--verifier.max_retries=0", environment=server.environment)
    assert done.returncode == 1
    failed = {path: fields[3] for path, fields in table(done).items() if len(fields) == 4}
    assert {Path(path).parts[-3] for path in failed} == {"00002"}
    assert all("refused" in reason for reason in failed.values())


def test_yes_and_no_are_shown(run):
    with OpenAIServer() as server:
        done = score(run / "00000/samples", "--prompt=x", "--verifier.name=yesno", environment=server.environment)
    labels = [fields[1] for fields in table(done).values()]
    assert set(labels) <= {"yes", "no"}
    assert f"{labels.count('yes') / 3:.0%} yes" in done.stderr


def test_a_killed_run_goes_on_with_what_is_left(run, tmp_path):
    out = tmp_path / "o.jsonl"
    with OpenAIServer(delay=0.4) as server:
        argv = ["infer.py", "score", run, "--no-probe", "--verifier.concurrency=1", "--out", out]
        process = Process(argv, server.environment)
        while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = out.read_text().splitlines()
        assert 3 <= len(before) < 12
        server.delay = 0.0
        done = score(run, "--no-probe", "--out", out, environment=server.environment)
        assert done.returncode == 0, done.stderr
        # The one that was under way is asked twice.
        assert 12 <= len(server.calls) <= 13
    after = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["image"] for line in after] == sorted(map(str, run.glob("*/samples/*")))
    assert all(line in after for line in map(json.loads, before))


def test_an_ensemble_of_a_model_here_and_an_endpoint_ranks_each_prompts_images(run, tmp_path):
    model = clip(tmp_path)[1].partition("=")[2]
    members = [
        {"name": "clip", "model": model, "options": {"batch_size": 4, "dtype": "float32"}},
        {"name": "openai", "max_retries": 0},
    ]
    flags = ["--no-probe", "--verifier.name=ensemble", f"--verifier.options={json.dumps({'members': members})}"]
    out = tmp_path / "o.jsonl"
    with OpenAIServer([Fault("refusal", when=lambda call: "3 kites" in call.text)]) as server:
        done = score(run, *flags, "--out", out, environment=server.environment)
        again = score(run, *flags, "--out", out, environment=server.environment)
        assert len(server.calls) == 12
    assert done.returncode == again.returncode == 0, done.stderr
    assert again.stdout == done.stdout
    found = table(done)
    for prompt in range(4):
        lines = [line for line in map(json.loads, out.open()) if f"/{prompt:05d}/" in line["image"]]
        columns = [[member["verdict"]["score"] for member in line["verdict"]["members"]] for line in lines]
        clips, grades = zip(*columns, strict=True)
        refused = prompt == 3
        assert (set(grades) == {None}) == refused
        shares = [(place(clips, k) + (0.5 if refused else place(grades, k))) / 2 for k in range(3)]
        assert [float(found[line["image"]][0]) for line in lines] == pytest.approx(shares, rel=1e-5)
        assert all(len(found[line["image"]]) == (4 if refused else 3) for line in lines)


def place(values: tuple[float, ...], k: int) -> float:
    return (sorted(values).index(values[k]) + 0.5) / len(values)  # no two are equal


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["none.png", "--prompt=x"], "none.png: no such file or folder"),
        ([], "no images: give files"),
        (["README.md", "--prompt=x", "--verifier.name=rewrad"], "did you mean reward?"),
        (["README.md", "--prompt=x", *REWARD, "--verifier.model=none"], "none: no such file or folder"),
    ],
)
def test_bad_input_is_one_line(argv, words):
    done = score(*argv)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_truncated_and_a_foreign_file_among_images(tmp_path):
    for k, image in enumerate(pictures(2)):
        image.resize((64, 64)).save(tmp_path / f"{k}.png")
    (tmp_path / "text.png").write_text("text")
    with PIL.Image.open(tmp_path / "0.png") as image:
        image.save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-400])
    done = score(tmp_path, "--prompt=a kite", *REWARD)
    assert done.returncode == 1
    found = table(done)
    assert {Path(path).name for path, fields in found.items() if len(fields) == 4} == {"text.png", "cut.jpg"}
    assert {Path(path).name for path, fields in found.items() if len(fields) == 3} == {"0.png", "1.png"}
