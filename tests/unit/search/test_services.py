"""Searches by the command line with a real server that fails: nothing that could not be had is recorded."""

import json
import re
import socket
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
import yaml

from rflow_jax.commands.main import main
from rflow_jax.search.prompt_folder import read_records
from rflow_jax.testing.openai_server import KEY, Fault, OpenAIServer, score_of
from rflow_jax.utils import cli
from tests.kit.fake_pipeline import instead_of_loading
from tests.kit.searching import files

ROLES = ("verifier", "reflector", "refiner")
CONFIG = {
    "model": "m",
    "lora": "l",
    "noise": {"search_rounds": 1, "search_branch": 2},
    "reflect": {"search_rounds": 2, "search_branch": 2},
    "sampling": {"height": 16, "width": 16, "condition_size": 16, "batch_size": 3},
} | {role: {"model": role, "max_retries": 1, "timeout": 0.4} for role in ROLES}
FAULTS = {
    "500": {"kind": "status", "status": 500},
    "503": {"kind": "status", "status": 503},
    "drop": {"kind": "drop"},
    "half body": {"kind": "half_body"},
    "late": {"kind": "delay", "seconds": 1.0},
}


@dataclass
class First:
    """Matches the first question of a role about a prompt, and its repetitions, and no other."""

    role: str
    prompt: str = ""
    digest: str = field(default="", init=False)

    def __call__(self, call) -> bool:
        if call.model == self.role and self.prompt in call.text:
            self.digest = self.digest or call.digest
        return call.digest == self.digest


@pytest.fixture
def pipe(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("rflow_jax.openai_client.retry._FIRST_PAUSE", 0.02)
    monkeypatch.setattr("rflow_jax.openai_client.client.LONGEST_PAUSE", 0.02)
    return instead_of_loading(monkeypatch)


def search(folder, server, out, *flags, kind="reflect", **config):
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "picture {n}"}}\n' for n in range(3)))
    address = [f"--{role}.base_url={server.base_url}" for role in (*ROLES,) if role not in config]
    words = [kind, f"--config={folder / 'config.yaml'}", f"--prompts={folder / 'prompts.jsonl'}", f"--out={out}"]
    return cli.run(lambda: main([*words, *address, *flags]))


def results(out):
    return {name: content for name, content in files(out).items() if not name.startswith(("usage", "config"))}


def answered(server, fault=None):
    """How often each question was answered, beside the first of each role."""
    calls = [call for call in server.calls if "a red square" not in call.text]
    return Counter(call.digest for call in calls if fault is None or call.digest != fault.when.digest)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(files of a search that nothing disturbed, its questions)."""
    folder = tmp_path_factory.mktemp("whole")
    with OpenAIServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        instead_of_loading(patch)
        assert search(folder, server, folder / "whole", "--no-probe") == 0
    return results(folder / "whole"), answered(server)


@pytest.mark.parametrize(
    ("role", "kind"), [*((role, "500") for role in ROLES), *(("verifier", kind) for kind in FAULTS if kind != "500")]
)
def test_what_a_service_left_unanswered_is_asked_by_the_next_run_and_nothing_else(
    pipe, whole, role, kind, tmp_path, capsys
):
    out, expected, questions = tmp_path / "run", *whole
    fault = Fault(when=First(role, "picture 1"), **FAULTS[kind])
    with OpenAIServer([fault]) as server:
        assert search(tmp_path, server, out, "--no-probe") == 1
    first = answered(server, fault)
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "without an answer" in line]
    assert line.startswith(f"questions without an answer: 1 of the {role} ({role}: ")
    assert line.endswith(f"({6 if kind == '503' else 2} attempts)); give the same command again, which asks them again")
    # Nothing of it is noted, the other image of its round is done, and no later round has begun.
    assert not (out / "00001/records.jsonl").exists()
    known = [json.loads(line) for line in (out / "00001/journal.jsonl").open()]
    assert not any(part.get("error") for entry in known for part in entry.values() if isinstance(part, dict))
    assert sum("verdict" in entry for entry in known) == (1 if role == "verifier" else 3)
    assert all((out / f"0000{n}/records.jsonl").exists() for n in (0, 2))
    with OpenAIServer() as server:
        assert search(tmp_path, server, out, "--no-probe") == 0
    assert results(out) == expected
    assert first + answered(server) == questions


def test_an_answer_that_cannot_be_used_stays_a_finding(pipe, tmp_path, capsys):
    with OpenAIServer([Fault("refusal", when=First("verifier", "picture 1"))]) as server:
        assert search(tmp_path, server, tmp_path / "run") == 1
        assert search(tmp_path, server, tmp_path / "run") == 1
    assert "all 3 prompts are done, 1 without a score" in capsys.readouterr().out
    errors = [record["verdict"]["error"] for record in read_records(tmp_path / "run/00001")]
    assert sum("the model refused" in (error or "") for error in errors) == 1


def test_converted_answers_are_counted_at_the_end_and_in_the_usage(pipe, tmp_path, capsys):
    class Texts(OpenAIServer):
        def respond(self, call, faults):
            reply = super().respond(call, faults)
            message = reply["choices"][0]["message"]
            grades = json.loads(message["content"])
            message["content"] = json.dumps({name.upper(): f"{mark['score']}/10" for name, mark in grades.items()})
            return reply

    with Texts() as server:
        assert search(tmp_path, server, tmp_path / "run", "--no-probe", kind="noise") == 0
        images = {call.image: score_of(call.image) for call in server.calls}
    assert "6 scored, 0 without a score, 6 answers converted" in capsys.readouterr().out
    used = json.loads((tmp_path / "run/usage.json").read_text())["roles"]["verifier"]
    assert (used["calls"], used["converted"]) == (6, 6)
    records = [record for n in range(3) for record in read_records(tmp_path / f"run/0000{n}")]
    assert sorted(record["verdict"]["score"] for record in records) == sorted(images.values())
    assert all(record["verdict"]["raw"]["OVERALL"].endswith("/10") for record in records)


def test_an_ensemble_has_no_verdict_while_a_member_has_none(pipe, tmp_path, capsys):
    def ensemble(server):
        members = [
            CONFIG["verifier"] | {"name": "openai", "model": model, "base_url": server.base_url} for model in "ab"
        ]
        return {"name": "ensemble", "members": members}

    fault = Fault("status", when=First("b", "picture 1"))
    with OpenAIServer() as server:
        assert search(tmp_path, server, tmp_path / "whole", kind="noise", verifier=ensemble(server)) == 0
    with OpenAIServer([fault]) as server:
        assert search(tmp_path, server, tmp_path / "run", "--no-probe", kind="noise", verifier=ensemble(server)) == 1
    assert f"1 of the verifier (verifier: openai b: b at {server.base_url}: HTTP 500" in capsys.readouterr().err
    with OpenAIServer() as server:
        assert search(tmp_path, server, tmp_path / "run", "--no-probe", kind="noise", verifier=ensemble(server)) == 0
        assert sorted(call.model for call in server.calls) == ["a", "b"]
    assert results(tmp_path / "run") == results(tmp_path / "whole")


# ---- the first question ----


@pytest.mark.parametrize(
    ("role", "status"), [*((role, 401) for role in ROLES), *(("verifier", status) for status in (400, 404, 503, 500))]
)
def test_a_service_that_fails_is_said_before_anything_is_loaded(pipe, role, status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rflow_jax.generation.pipeline.load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    with OpenAIServer([Fault("status", status=status, when=lambda call: call.model == role)]) as server:
        assert search(tmp_path, server, tmp_path / "new/run") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {role}: {role} at {server.base_url}: HTTP {status}")
    assert not (tmp_path / "new").exists()


def test_no_server_at_all_is_said_within_seconds(pipe, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = type("Server", (), {"base_url": f"http://127.0.0.1:{port}/v1"})
    begin = time.monotonic()
    assert search(tmp_path, server, tmp_path / "run") == 1
    assert time.monotonic() - begin < 5
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: verifier: verifier at {server.base_url}: no connection, or it broke")
    assert "--no-probe" in line


def test_a_page_in_place_of_an_api_is_said(pipe, tmp_path, capsys):
    class Page(OpenAIServer):
        def respond(self, call, faults):
            return {"html": "Welcome!"} if call.model == "refiner" else super().respond(call, faults)

    with Page() as server:
        assert search(tmp_path, server, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: refiner: refiner at {server.base_url}: the server's reply is not a chat completion")


def test_the_first_question_settles_the_form_and_is_counted(pipe, tmp_path):
    out = tmp_path / "run"
    with OpenAIServer(refuse=["json_schema"]) as server:
        assert search(tmp_path, server, out, kind="noise") == 0
        first = server.calls[0]
        assert "a red square" in first.text
        assert len(first.images) == 1
        assert [call.format for call in server.calls] == ["json_schema", *["json_object"] * (1 + 6)]
    used = json.loads((out / "usage.json").read_text())["roles"]["verifier"]
    assert (used["calls"], used["attempts"]) == (7, 8)


UNUSABLE = {
    "refusal": "the model refused: I cannot help with that.",
    "empty": "the answer is empty",
    "off_schema": "the answer lacks",
    "truncated": "the answer is not valid JSON|the answer was cut",
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_first_answer_is_judged_like_any_other(pipe, kind, tmp_path, capsys):
    with OpenAIServer([Fault(kind)]) as server:
        assert search(tmp_path, server, tmp_path / "run", kind="noise") == 1
        assert len(server.calls) == 2  # with one further attempt
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: verifier: verifier at {server.base_url}: ")
    assert re.search(UNUSABLE[kind], line)
    assert "; expected JSON with a score from 0 to 10 for" in line
    assert ("and it answered '{}'" in line) == (kind == "off_schema")
    assert ("and it answered nothing" in line) == (kind in ("refusal", "empty"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("times", "pause", "status"), [(3, 0.01, 0), (None, 0.01, 1), (1, 90, 1)])
def test_a_busy_server_is_asked_first_for_a_while_and_no_run_begins_without(
    pipe, times, pause, status, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setattr("rflow_jax.openai_client.client._BUSY_TIME", 0.3)
    with OpenAIServer([Fault("status", status=429, retry_after=pause, times=times)]) as server:
        begin = time.monotonic()
        assert search(tmp_path, server, tmp_path / "run", "--verifier.max_retries=0", kind="noise") == status
        assert time.monotonic() - begin < 5
    if status:
        assert "HTTP 429: too many requests" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    if pause < 1:
        assert any("is busy; asking it again" in message for message in caplog.messages)


@pytest.mark.parametrize("role", ROLES)
def test_what_ends_in_the_middle_ends_the_run_and_is_no_finding(pipe, whole, role, tmp_path, capsys):
    """The account's end comes with a status that a refused picture may have as well."""
    ended = Fault(
        "status", status=403, message="access terminated", when=lambda call: call.model == role and call.number >= 8
    )
    with OpenAIServer([ended]) as server:
        begin = time.monotonic()
        assert search(tmp_path, server, tmp_path / "run") == 1
        assert time.monotonic() - begin < 10
    said = capsys.readouterr().err
    assert f"error: {role}: {role} at {server.base_url}: HTTP 403: " in said
    assert "access terminated (1 attempt), also to a question that was answered before" in said
    with OpenAIServer() as server:
        assert search(tmp_path, server, tmp_path / "run") == 0
    assert results(tmp_path / "run") == whole[0]


def test_refusals_of_one_picture_are_findings_beside_a_service_that_answers(pipe, tmp_path):
    victim = First("verifier", "picture 1")
    with OpenAIServer([Fault("status", status=400, message="content policy violation", when=victim)]) as server:
        assert search(tmp_path, server, tmp_path / "run", kind="noise") == 1
    records = [record for n in range(3) for record in read_records(tmp_path / f"run/0000{n}")]
    errors = [record["verdict"]["error"] for record in records if record["verdict"]["error"]]
    assert errors == ["HTTP 400: content policy violation (1 attempt)"]


def test_the_summary_names_prompts_that_are_not_decided(pipe, tmp_path, capsys):
    lost = Fault("status", status=500, when=lambda call: call.model == "verifier" and "picture 1" in call.text)
    with OpenAIServer([lost]) as server:
        assert search(tmp_path, server, tmp_path / "run", kind="noise") == 1
    said = capsys.readouterr().out
    assert "1 of the prompts not decided yet (00001): the same command goes on" in said
    assert "; the best of the others are in " in said
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "picture 1"}\n')
    with OpenAIServer([lost]) as server:
        assert search(tmp_path, server, tmp_path / "other", "--end=2", "--start=1", kind="noise") == 1
    assert "are in" not in capsys.readouterr().out


def test_score_asks_first_too_and_names_the_role(pipe, tmp_path, capsys):
    with OpenAIServer() as server:
        assert search(tmp_path, server, tmp_path / "run", kind="noise") == 0
    capsys.readouterr()
    words = ["score", str(tmp_path / "run"), f"--out={tmp_path / 'o.jsonl'}"]
    with OpenAIServer([Fault("status", status=401)]) as server:
        assert cli.run(lambda: main([*words, f"--verifier.base_url={server.base_url}"])) == 1
        assert len(server.calls) == 1
    assert capsys.readouterr().err.startswith(f"error: verifier: gpt-4o at {server.base_url}: HTTP 401")
    assert not (tmp_path / "o.jsonl").exists()


def test_scores_that_could_not_be_had_are_asked_for_again(pipe, tmp_path, capsys):
    with OpenAIServer() as server:
        assert search(tmp_path, server, tmp_path / "run", kind="noise") == 0

    def score(server, out):
        flags = ["--no-probe", "--verifier.max_retries=0", "--verifier.concurrency=1"]
        words = ["score", str(tmp_path / "run"), f"--out={tmp_path / out}", f"--verifier.base_url={server.base_url}"]
        return cli.run(lambda: main([*words, *flags]))

    with OpenAIServer() as server:
        assert score(server, "whole") == 0
    with OpenAIServer([Fault("status", when=First("gpt-4o", "picture 2"))]) as server:
        assert score(server, "some") == 1
    said = capsys.readouterr()
    assert "1 question of the verifier without an answer (the same command asks again)" in said.err
    assert sum(line.startswith("-\t-\t") and "HTTP 500" in line for line in said.out.splitlines()) == 1
    assert len((tmp_path / "some").read_text().splitlines()) == 5
    with OpenAIServer() as server:
        assert score(server, "some") == 0
        assert len(server.calls) == 1
    assert (tmp_path / "some").read_bytes() == (tmp_path / "whole").read_bytes()


def test_secrets_of_a_members_address_are_in_no_file_and_no_message(pipe, tmp_path, capsys, caplog):
    def verifier(server, **more):
        url = server.base_url.replace("//", "//me:hidden-pw@") + "?token=hidden-token"
        members = [CONFIG["verifier"] | {"name": name, "base_url": url} | more for name in ("openai", "yesno")]
        return {"name": "ensemble", "members": members}

    out = tmp_path / "run"
    lost = Fault("status", status=503, when=First("verifier", "picture 1"), message="me:hidden-pw hidden-token")
    with OpenAIServer([lost]) as server:
        assert search(tmp_path, server, out, kind="noise", verifier=verifier(server)) == 1
    with OpenAIServer([Fault("status", status=401)]) as server:
        assert search(tmp_path, server, out, kind="noise", verifier=verifier(server)) == 1
    with OpenAIServer() as server:
        assert search(tmp_path, server, out, kind="noise", verifier=verifier(server)) == 0
        (tmp_path / "score.yaml").write_text(yaml.safe_dump({"verifier": verifier(server)}))
        words = ["score", str(out), f"--config={tmp_path / 'score.yaml'}", f"--out={tmp_path / 'run/scores.jsonl'}"]
        assert cli.run(lambda: main(words)) == 0
    said = capsys.readouterr()
    written = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert "127.0.0.1" in said.err
    assert b"127.0.0.1" in written
    for secret in ("hidden-pw", "hidden-token"):
        assert secret not in said.out + said.err + caplog.text
        assert secret.encode() not in written


def test_an_account_that_ends_while_images_are_scored_is_no_finding(pipe, tmp_path, capsys):
    with OpenAIServer() as server:
        assert search(tmp_path, server, tmp_path / "run", kind="noise") == 0

    def score(server, out):
        words = ["score", str(tmp_path / "run"), f"--out={tmp_path / out}", f"--verifier.base_url={server.base_url}"]
        return cli.run(lambda: main([*words, "--verifier.concurrency=1"]))

    with OpenAIServer([Fault("status", status=400, when=lambda call: call.number >= 4)]) as server:
        assert score(server, "scores") == 1
        assert f"error: verifier: gpt-4o at {server.base_url}: HTTP 400" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "scores").open()]
    assert 1 <= len(lines) <= 3
    assert all(line["verdict"]["score"] is not None for line in lines)
    with OpenAIServer() as server:
        assert score(server, "scores") == 0
        assert len(server.calls) == 1 + 6 - len(lines)
