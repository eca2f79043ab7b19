"""Keys stay hidden, and settings are checked and reach the request."""

import logging

import pytest

from rflow_jax.errors import InputError, ServiceError
from rflow_jax.openai_client import Chat, Endpoint
from rflow_jax.testing.openai_server import KEY, Fault, OpenAIServer
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
