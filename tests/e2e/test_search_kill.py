"""A search that is killed again and again ends with the files of one that was left alone.

``RFLOW_KILLS=10 pytest tests/e2e/test_search_kill.py`` kills it more often than the default, which is quicker.
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from rflow_jax.testing.openai_server import Chaos, OpenAIServer
from tests.kit.processes import Process

KILLS = int(os.environ.get("RFLOW_KILLS", "3"))
SEARCH = [
    "--config=configs/debug.yaml",
    "--prompts=configs/prompts_debug.jsonl",
    "--end=3",
    "--sampling.num_inference_steps=12",
    "--verifier.max_retries=9",
    "--reflector.max_retries=9",
    "--refiner.max_retries=9",
    "--verifier.timeout=3",
    "--reflector.timeout=3",
    "--refiner.timeout=3",
    "--reflect.history=1",
]
OWN_COURSE = {"usage.json"}  # seconds and tokens: a search that was killed took more


def start(out: Path, server: OpenAIServer) -> Process:
    return Process(["infer.py", "reflect", *SEARCH, f"--out={out}"], server.environment)


def finish(out: Path, server: OpenAIServer) -> str:
    process = start(out, server)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return said


def files(out: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if name not in OWN_COURSE}


def progress(out: Path) -> int:
    """Grows with everything that is finished."""
    journals = sum(path.read_bytes().count(b"\n") for path in out.glob("*/journal.jsonl"))
    return journals + len(list(out.glob("*/midimg/*.png"))) + 20 * len(list(out.glob("*/records.jsonl")))


def kill_after(process: Process, out: Path, steps: int, seconds: float) -> bool:
    """Kills the process some time after it has got so much further; false if it ended first."""
    begin = progress(out)
    while process.poll() is None and progress(out) < begin + steps:
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of a search that was left alone, folder of one that was killed, what its last start said)."""
    alone, killed = (tmp_path_factory.mktemp("search") / name for name in ("alone", "killed"))
    rng = random.Random(5)
    with OpenAIServer(chaos=Chaos(0.1, hang=4.0), delay=0.05, spread=0.1) as server:
        finish(alone, server)
    with OpenAIServer(chaos=Chaos(0.1, seed=1, hang=4.0), delay=0.05, spread=0.1) as server:
        hits = [
            kill_after(start(killed, server), killed, rng.randint(0, 50 // KILLS), rng.random() / 4)
            for _ in range(KILLS)
        ]
        assert all(hits), "the search was over before it could be killed"
        yield alone, killed, finish(killed, server)


def test_the_files_are_those_of_a_search_that_was_left_alone(runs):
    alone, killed, _ = runs
    assert files(killed).keys() == files(alone).keys()
    for name, content in files(alone).items():
        if name == "config.yaml":  # each names its own folder
            content = content.replace(str(alone).encode(), str(killed).encode())
            own = [line for line in content.splitlines() if b"base_url" not in line]
            assert [line for line in (killed / name).read_bytes().splitlines() if b"base_url" not in line] == own
        else:
            assert (killed / name).read_bytes() == content, name


def test_what_was_finished_was_not_done_again(runs):
    _, _, said = runs
    made = int(said.split(" images")[0].split()[-1])
    assert 0 < made < 24


def test_a_finished_folder_is_left_as_it_is(runs):
    alone, _, _ = runs
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    with OpenAIServer() as server:
        assert finish(alone, server) == f"{alone}: all 3 prompts are done; nothing to do\n"
    assert server.calls == []
    assert before == {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
