"""The local server itself: it must fail in every way, and in the same way each time."""

import http.client
import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from rflow_jax.openai_client import Endpoint, vision_messages
from rflow_jax.openai_client.accepted import Accepted
from rflow_jax.openai_client.protocol import request
from rflow_jax.testing.openai_answers import Call
from rflow_jax.testing.openai_server import KEY, Chaos, OpenAIServer
from tests.kit.asking import pictures, question

ROOT = Path(__file__).parents[3]


def body(number: int, **more) -> dict:
    image = pictures(1, number)[0]
    return {"model": "m", "messages": vision_messages("Be brief.", f"question {number}", image), **more}


def call(number: int, attempt: int = 0, **more) -> Call:
    return Call(number, {"model": "m", "messages": [{"role": "user", "content": str(number)}], **more}, "", attempt)


def happenings(chaos: Chaos, attempt: int = 0, **more) -> list[str]:
    faults = [chaos.fault_for(call(number, attempt, **more)) for number in range(2000)]
    return ["" if fault is None else f"{fault.kind} {fault.status}".removesuffix(" 500") for fault in faults]


def test_chaos_strikes_its_share_in_every_way():
    found = Counter(happenings(Chaos(0.3), logprobs=True))
    struck = 2000 - found.pop("")
    assert 0.25 < struck / 2000 < 0.35
    assert set(found) == {
        "status 408", "status 409", "status 429", "status", "status 502", "status 503", "delay", "drop", "half_body",
        "cut_body", "truncated", "refusal", "empty", "off_schema",
    }  # fmt: skip
    assert min(found.values()) > struck / 14 / 2
    assert "off_schema" not in happenings(Chaos(0.3))
    assert set(happenings(Chaos(0.0))) == {""}
    assert "" not in happenings(Chaos(1.0))


def test_chaos_follows_from_seed_request_and_attempt():
    assert happenings(Chaos(0.3)) == happenings(Chaos(0.3))
    assert len({tuple(happenings(Chaos(0.3, seed), attempt)) for seed in (0, 1) for attempt in (0, 1)}) == 4


def test_the_server_counts_how_often_a_request_came():
    with OpenAIServer() as server:
        for number in (0, 1, 0, 0):
            post(server.base_url, body(number))
        assert [call.attempt for call in server.calls] == [0, 0, 1, 2]
        assert [call.number for call in server.calls] == [0, 1, 2, 3]


def post(base_url: str, fields: dict) -> dict:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    asked = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(asked) as reply:
        return json.load(reply)


def test_another_path_is_not_found():
    with OpenAIServer() as server:
        connection = http.client.HTTPConnection(server.base_url.split("/")[2])
        connection.request("POST", "/v1/embeddings", "{}")
        assert connection.getresponse().status == 404
        connection.close()


ASKS = """
import json, os, sys, time, urllib.request
begin = time.monotonic()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
try:
    with urllib.request.urlopen(urllib.request.Request(url, sys.argv[1].encode(), headers)) as reply:
        found = json.load(reply)
    print(json.dumps({"usage": "usage" in found, "seconds": time.monotonic() - begin}))
except urllib.error.HTTPError as error:
    print(json.dumps({"status": error.code, "said": json.load(error)["error"]["message"]}))
sys.exit(7)
"""


def launch(*options: str, **more) -> dict:
    fields = json.dumps(request(Endpoint(), question(), Accepted()) | more)
    command = [
        sys.executable,
        "-m",
        "rflow_jax.testing.openai_server",
        *options,
        "--",
        sys.executable,
        "-c",
        ASKS,
        fields,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
    return json.loads(done.stdout)


def test_the_launcher_hands_its_options_on_and_the_commands_status_back():
    assert launch()["usage"]
    slow = launch("--delay", "0.4", "--spread", "0.1", "--no-usage")
    assert not slow["usage"]
    assert 0.4 <= slow["seconds"] < 5
    refused = launch("--refuse", "json_object", response_format={"type": "json_object"})
    assert refused == {"status": 400, "said": "response_format: json_object is not supported"}
    assert launch("--fault", "status=418")["status"] == 418


@pytest.mark.parametrize("options", [["--fault", "flood"], ["--refuse", "xml"], ["--chaos", "much"]])
def test_wrong_options_are_refused(options):
    command = [sys.executable, "-m", "rflow_jax.testing.openai_server", *options, "--", "true"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 2
