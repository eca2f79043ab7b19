"""Keys stay hidden, and settings are checked and reach the request."""

import logging
from datetime import date

import pytest

from rflow_jax.errors import InputError, ServiceError
from rflow_jax.openai_client import Chat, Endpoint
from rflow_jax.testing.openai_server import KEY, Fault, OpenAIServer
from rflow_jax.verifiers.config import VERIFIERS
from rflow_jax.writers.base import WRITERS
from tests.kit.asking import ask, question


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


LEAKS = {
    "echo": "wrong key {key}!",
    "json": '{"authorization":"Bearer {key}"}',
    "masked": f"Incorrect API key provided: {KEY[:7]}********{KEY[-4:]}.",
    "dots": f"Incorrect API key provided: {KEY[:5]}...{KEY[-4:]}",
    "beginning": f"key {KEY[:12]} is unknown",
    "long": "x " * 145 + "{key}",
}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
@pytest.mark.parametrize("said", LEAKS)
def test_no_part_of_the_key_is_shown(said, status, caplog, capfd):
    for name in (None, "openai", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    fault = Fault("status", status=status, message=LEAKS[said])
    with OpenAIServer([fault]) as server:
        chat = Chat(Endpoint(base_url=server.base_url, max_retries=0, patience=0))
        answer = answer_or_refusal(chat)
        chat.close()
    captured = capfd.readouterr()
    shown = "\n".join((repr(answer), repr(chat), repr(vars(chat)), captured.out, captured.err, caplog.text))
    assert str(status) in str(answer)
    assert answer.__cause__ is None
    assert answer.__context__ is None
    assert not [
        shown[max(0, at - 40) : at + 20] for part in (KEY[:5], KEY[-4:], KEY[5:13]) if (at := shown.find(part)) >= 0
    ]


def answer_or_refusal(chat):
    try:
        return chat.ask_all([question()])[0]
    except ServiceError as refusal:
        return refusal


def test_a_key_that_a_model_repeats_is_blotted_out(monkeypatch):
    def parse(answer):
        return answer.text

    class Parrot(OpenAIServer):
        def respond(self, call, faults):
            reply = super().respond(call, faults)
            reply["choices"][0]["message"]["content"] = f"your key is {KEY}, right?"
            return reply

    with Parrot() as server:
        assert ask(server, [question(parse=parse)]) == ["your key is ***, right?"]


def test_a_password_in_the_address_is_not_shown():
    endpoint = Endpoint(base_url="http://me:hidden-word@127.0.0.1:9/v1", max_retries=0, patience=0)
    assert "hidden-word" not in repr(endpoint)
    chat = Chat(endpoint)
    assert "hidden-word" not in str(answer_or_refusal(chat))
    chat.close()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"concurrency": 0}, "concurrency"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"base_url": "localhost"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://host:port/v1"}, "base_url"),
        ({"base_url": "http://me:secret word@host/v1"}, "base_url"),
        ({"base_url": "http://host/v1\n"}, "base_url"),
        ({"structured": "xml"}, "structured"),
        ({"price_input": 1.0}, "price_output"),
        ({"price_input": -1.0, "price_output": 1.0}, "price_input"),
        ({"api_key_env": "sk-secret"}, "api_key_env"),
        ({"api_key_env": "gsk_secret"}, "api_key_env"),
    ],
)
def test_impossible_settings_are_bad_input(wrong, word):
    with pytest.raises(InputError, match=word) as caught:
        Endpoint(**wrong)
    assert "secret" not in str(caught.value)


def test_keys_and_addresses_of_the_environment_are_checked(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-padded-key\n")
    assert Endpoint().api_key() == "sk-padded-key"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-two\nlines")
    with pytest.raises(InputError, match="OPENAI_API_KEY contains characters") as caught:
        Chat(Endpoint())
    assert "lines" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(InputError, match="set the environment variable OPENAI_API_KEY"):
        Chat(Endpoint())
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    with pytest.raises(InputError, match="OPENAI_BASE_URL must be an address"):
        Chat(Endpoint())


def test_settings_reach_the_request():
    with OpenAIServer() as server:
        ask(server, [question()], model="m", temperature=0.5, max_tokens=7)
        ask(server, [question(options={"temperature": 0, "max_tokens": 1})], temperature=0.5, max_tokens=7)
        bodies = [{k: v for k, v in call.body.items() if k != "messages"} for call in server.calls]
    assert bodies == [
        {"model": "m", "temperature": 0.5, "max_tokens": 7},
        {"model": "gpt-4o", "temperature": 0, "max_tokens": 1},
    ]


BODIES = {
    "model": ({"model": "other"}, "give it as the setting model"),
    "max_completion_tokens": ({"max_completion_tokens": 5}, "give it as the setting max_tokens"),
    "response_format": ({"response_format": {"type": "text"}}, "give it as the setting structured"),
    "messages": ({"messages": []}, "questions are made from the prompt files"),
    "stream": ({"stream": True}, "one answer a question is read, whole"),
    "n": ({"top_k": 1, "n": 2}, "one answer a question is read, whole"),
    "tools": ({"tools": []}, "one answer a question is read, whole"),
    "since": ({"since": date(2026, 1, 1)}, "cannot be sent as JSON"),
    "bias": ({"bias": {"a": [float("nan")]}}, "cannot be sent as JSON"),
    "raw": ({"raw": b"x"}, "cannot be sent as JSON"),
    "half": ({"half": "\ud800"}, "cannot be sent as JSON"),
}


@pytest.mark.parametrize("field", BODIES)
@pytest.mark.parametrize("role", ["verifier", "writer"])
def test_fields_that_requests_have_anyway_are_refused_by_name(field, role):
    body, reason = BODIES[field]
    registry = VERIFIERS if role == "verifier" else WRITERS
    if field == "response_format" and role == "writer":
        reason = "is fixed for this kind of question"
    with pytest.raises(InputError, match=rf"^{role}: extra_body\.{field}: {reason}"):
        registry.parse({"extra_body": body}, source=role)


def test_what_a_decision_fixes_is_refused_too():
    with pytest.raises(InputError, match=r"^verifier: extra_body\.temperature: is fixed for this kind of question"):
        VERIFIERS.parse({"name": "yesno", "extra_body": {"temperature": 1}})


def test_other_fields_reach_the_request():
    body = {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False}, "user": None}
    with OpenAIServer() as server:
        ask(server, [question()], extra_body=body)
        assert body.items() <= server.calls[0].body.items()


HEADERS = {
    "X-Title: its value must be of letters": {"X-Title": "umlaut \u00e4"},
    "X-Two": {"X-Two": "a\r\nX-Three: b"},
    "X Y: the name of a header": {"X Y": "a"},
    "authorization: stands twice, also as Authorization": {"Authorization": "$A", "authorization": "$B"},
    "x-a: stands twice, also as X-A": {"X-A": "1", "x-a": "1"},
    "Content-Length: is set by the client": {"Content-Length": "5"},
    "X-Key: give \\$ and the name": {"X-Key": "abc"},
    "X-Key: after \\$ give the name": {"X-Key": "$"},
    "X-Empty: its value": {"X-Empty": ""},
}


@pytest.mark.parametrize("reason", HEADERS)
def test_headers_that_cannot_be_sent_are_named_with_their_role(reason):
    with pytest.raises(InputError, match=rf"^reflector: extra_headers\.{reason}") as caught:
        WRITERS.parse({"extra_headers": HEADERS[reason]}, source="reflector")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [5, None, True, ["a"], {"a": "b"}])
def test_a_header_that_is_no_text_is_named_with_its_role(value):
    with pytest.raises(InputError, match=r"^reflector\.extra_headers\.X-A.*valid string"):
        WRITERS.parse({"extra_headers": {"X-A": value}}, source="reflector")


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "H is not set, or empty"), (" ", "H is not set"), ("a\nb", "H contains characters")]
)
def test_headers_of_the_environment_are_checked(value, reason, monkeypatch):
    monkeypatch.delenv("H", raising=False)
    if value is not None:
        monkeypatch.setenv("H", value)
    with pytest.raises(InputError, match=rf"extra_headers\.X-Key: the environment variable {reason}"):
        Chat(Endpoint(base_url="http://localhost/v1", extra_headers={"X-Key": "$H"}))


def test_authorization_is_sent_once(monkeypatch):
    monkeypatch.setenv("H", "Basic abc\n")
    own = {"authorization": "$H"}
    with pytest.raises(InputError, match=r"extra_headers\.authorization: the key in OPENAI_API_KEY is sent as"):
        Chat(Endpoint(base_url="http://localhost/v1", extra_headers=own))
    monkeypatch.delenv("OPENAI_API_KEY")
    with OpenAIServer() as server:
        ask(server, [question()], extra_headers=own)
        assert server.calls[0].authorization == "Basic abc"


def test_a_query_of_the_address_is_sent_and_shown_nowhere(caplog, capfd):
    for name in (None, "openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    seen = []

    class Queried(OpenAIServer):
        def log(self, call):
            seen.append(call.query)
            return super().log(call)

    with Queried(
        [Fault("status", status=400, message="bad value hidden%2Fword or hidden/word, me:secret-pw")]
    ) as server:
        url = server.base_url.replace("//", "//me:secret-pw@") + "?token=hidden%2Fword&api-version=1#hidden-fragment"
        with pytest.raises(ServiceError) as caught:
            ask(server, [question()], base_url=url)
    assert seen[0] == "token=hidden%2Fword&api-version=1"
    captured = capfd.readouterr()
    for text in (str(caught.value), caplog.text, captured.out, captured.err):
        assert "hidden" not in text
        assert "secret-pw" not in text
    assert f"gpt-4o at {server.base_url}: HTTP 400" in str(caught.value)
