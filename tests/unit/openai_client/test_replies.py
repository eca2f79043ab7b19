"""Replies of servers in other forms, and what a model writes around its answer."""

import contextlib
import socket
import threading
import zlib

import pytest

from rflow_jax.errors import InputError, ServiceError
from rflow_jax.openai_client import Endpoint, UnusableAnswer
from rflow_jax.openai_client.answer_text import only_answer
from rflow_jax.openai_client.messages import UnfitReply
from rflow_jax.openai_client.protocol import read_answer, read_body, read_error, read_usage
from rflow_jax.openai_client.retry import LONGEST_RETRY_AFTER, retry_after
from rflow_jax.openai_client.usage import Usage
from rflow_jax.testing.openai_server import KEY, Fault, OpenAIServer
from rflow_jax.utils.network import is_loopback, printable, require_usable_network
from tests.kit.asking import ask, expected, question

MOVE = "Move the cup."
ANSWERS = [
    MOVE,
    f"<think>The user wants</think>\n{MOVE}",
    f"The user wants ... </think> {MOVE}",
    f"{MOVE}<think>done</think>",
    f"[THINK]hm[/THINK]{MOVE}</s>",
    f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{MOVE}<|return|>",
    f"analysisThe user wantsassistantfinal{MOVE}",
    f"<think>hm</think><|begin_of_box|>{MOVE}<|end_of_box|>",
    f"<|im_start|>assistant\n{MOVE}<|im_end|>",
    f"\u25c1think\u25b7hm\u25c1/think\u25b7{MOVE}",
    f"{MOVE}<\uff5cend\u2581of\u2581sentence\uff5c>",
    f"```text\n{MOVE}\n```",
    f"Here is the reflection:\n```\n{MOVE}\n```",
    f"Sure! Here's the refined prompt: {MOVE}",
    f"**Reflection:** {MOVE}",
]
NONE = {
    "": "is empty",
    "<think>The user wants": "do not end",
    "<think>hm</think>": "no answer",
    "hm</think> ": "no answer",
    "[THINK]hm": "do not end",
    "<|channel|>analysis<|message|>hm": "no final channel",
    "analysisThe user wants": "no final channel",
    '<tool_call>{"name": "x"}</tool_call>': "calls a tool",
    "Here is the reflection:": "apart from",
}


@pytest.mark.parametrize("text", ANSWERS)
def test_only_the_answer_is_used(text):
    assert only_answer(text) == MOVE


@pytest.mark.parametrize("text", NONE)
def test_thoughts_alone_are_no_answer(text):
    with pytest.raises(UnusableAnswer, match=NONE[text]):
        only_answer(text)


@pytest.mark.parametrize("text", ["Here is a red cup.", "A photo: two cups", "analysis of light", "Use ```x``` here"])
def test_plain_words_stay(text):
    assert only_answer(text) == text


def message(**fields):
    return {"choices": [{"message": {"role": "assistant", **fields}, "finish_reason": "stop"}]}


def test_parts_of_a_message_are_joined():
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Move "}, {"type": "text", "text": "it"}]
    assert read_answer(message(content=parts)).text == "Move it"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"content": None, "tool_calls": [{"id": "1"}]}, "calls a tool"),
        ({"content": None, "reasoning_content": "hm"}, "thoughts and no answer"),
        ({"content": "", "reasoning": "hm"}, "thoughts and no answer"),
    ],
)
def test_a_message_without_an_answer_says_why(fields, why):
    with pytest.raises(UnusableAnswer, match=why):
        read_answer(message(**fields))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"error": {"message": "busy", "code": 429}}, 429),
        ({"error": "busy", "choices": []}, 500),
        ({"error": {"message": "x", "code": "9" * 5000}}, 500),
        ({"choices": [{"finish_reason": "error", "message": {}}]}, 500),
        ({"choices": [{"error": {"message": "x", "code": 502}}]}, 502),
    ],
)
def test_errors_inside_a_reply(body, status):
    found = read_error(body)
    assert found is not None
    assert found[0] == status


REFUSALS = [
    ("max_tokens", "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'", {"max_tokens": 99}),
    ("temperature", "Unsupported value: 'temperature' does not support 0", {"temperature": 0.0}),
]


@pytest.mark.parametrize(("name", "words", "settings"), REFUSALS)
def test_a_refused_setting_is_left_out_from_then_on(monkeypatch, name, words, settings):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    fault = Fault("status", status=400, message=words, when=lambda call: name in call.body)
    with OpenAIServer([fault]) as server:
        more = {"concurrency": 1, "extra_body": {"top_k": 20}, "reasoning_effort": "low"}
        assert ask(server, [question(n) for n in range(2)], **settings, **more) == expected(range(2))
        assert [name in call.body for call in server.calls] == [True, False, False]
        assert server.calls[-1].body["top_k"] == 20
        assert server.calls[-1].body["reasoning_effort"] == "low"


def test_fewer_log_probabilities(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    fault = Fault("status", status=400, message="logprobs: at most 5", when=lambda c: c.body["top_logprobs"] > 5)
    asked = question(parse=lambda answer: len(answer.tokens) > 1, options={"logprobs": True, "top_logprobs": 20})
    with OpenAIServer([fault]) as server:
        assert ask(server, [asked]) == [True]
        assert [call.body["top_logprobs"] for call in server.calls] == [20, 10, 5]


def test_words_of_a_server_are_printable(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert printable("a\x1b[31mred\x1b[0m\x07 \x1b]0;title\x07b\u202e") == "ared b"
    with OpenAIServer([Fault("status", status=413, message="\x1b[2Jbig" * 10_000)]) as server:
        said = why(server)
    assert "\x1b" not in said
    assert len(said) < 450


@pytest.mark.parametrize("value", ["Fri, 01 Jan 2099 00:00:00 GMT", "-5", "9" * 1000, "1e9"])
def test_waits_are_bounded(value):
    assert 0 <= retry_after({"retry-after": value}) <= LONGEST_RETRY_AFTER


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks://localhost:1"), ("https_proxy", "http://"), ("SSL_CERT_FILE", "/no/such/file")],
)
def test_a_broken_environment_is_named(monkeypatch, name, value):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name):
        require_usable_network()
    with OpenAIServer() as server:
        assert ask(server, [question()]) == expected([0])  # loopback needs neither


def test_loopback_addresses():
    assert [is_loopback(f"http://{host}/v1") for host in ("127.0.0.1:8", "[::1]:8", "localhost", "a.b")] == [
        True,
        True,
        True,
        False,
    ]


def test_headers_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("GATEWAY", "abc")
    assert Endpoint(extra_headers={"X-Key": "$GATEWAY"}).headers() == {"X-Key": "abc"}
    with pytest.raises(InputError, match="extra_headers"):
        Endpoint(extra_headers={"X-Key": "$NOT_SET"}).headers()
    with pytest.raises(InputError, match=r"extra_headers\.Authorization: give \$ and the name") as error:
        Endpoint(extra_headers={"Authorization": "Bearer abc"})
    assert "abc" not in str(error.value)


@pytest.fixture
def flood():
    """Makes a server that answers with a status and a body without end; {"sent"} counts its bytes."""
    listeners = []

    def start(status, headers=b"", chunk=b" " * 2**16):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        count = {"sent": 0}

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(2**20)
                        connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n%s\r\n" % (status, 2**40, headers))
                        while count["sent"] < 2**28:
                            connection.sendall(chunk)
                            count["sent"] += len(chunk)

        threading.Thread(target=serve, daemon=True).start()
        return type("Server", (), {"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "count": count})

    yield start
    for listener in listeners:
        listener.close()


def why(server):
    """Why a server that answers nothing else gives no answer."""
    try:
        (answer,) = ask(server, [question()], max_retries=0)
    except ServiceError as error:
        return str(error)
    return str(answer)


@pytest.mark.parametrize(
    ("headers", "body", "said"),
    [
        (b"Content-Type: text/html; charset=base64", b"no", "HTTP 400: no"),
        (b"Content-Type: text/plain; charset=rot13", b"no", "HTTP 400: no"),
        (b"Retry-After: \xb2", b'{"error": {"code": ["a"], "message": {"b": 1}}}', "HTTP 400: {'b': 1}"),
        (b"X-A: b", b"<!-- --><HTML><title>Sign in</title>", "HTTP 400: a web page ('Sign in')"),
        (b"X-A: b", b"[" * 50_000, "HTTP 400: [[["),
    ],
)
def test_odd_headers_and_bodies_of_an_error_are_one_line(monkeypatch, headers, body, said):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def serve(listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(2**20)
                    connection.sendall(
                        b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n%s\r\n\r\n" % (len(body), headers) + body
                    )

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        server = type("Server", (), {"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"})
        assert said in why(server)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html><title>Portal", r"is a web page \('Portal'\), not a chat completion"),
        (b'data: {"choices": []}', "not a chat completion .*: data: "),
        (b" ", "it is empty"),
        (b"[1]", r"not a chat completion: \[1\]"),
    ],
)
def test_replies_of_another_kind_are_quoted(content, said):
    with pytest.raises(UnfitReply, match=said):
        read_body(content)


def test_counts_of_tokens_that_cannot_be_are_none():
    endpoint = Endpoint(base_url="http://localhost/v1", price_input=1.0, price_output=1.0)
    for count in (10**400, -1, "5", None):
        assert read_usage({"usage": {"prompt_tokens": count, "completion_tokens": 1}}, endpoint) == Usage(unmetered=1)


@pytest.mark.parametrize(("status", "said"), [(200, "reply is longer than 16 MB"), (500, "HTTP 500")])
def test_a_reply_without_end_is_cut_off(monkeypatch, flood, status, said):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = flood(status)
    assert said in why(server)
    assert server.count["sent"] < 2**27  # a question that every server answers is asked three times


def test_a_packed_reply_without_end_is_cut_off(monkeypatch, flood):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    packed = zlib.compressobj(wbits=31)
    block = packed.compress(b" " * 2**26) + packed.flush(zlib.Z_SYNC_FLUSH)
    server = flood(200, b"Content-Encoding: gzip\r\n", block)
    assert "reply is longer than 16 MB" in why(server)


def test_redirects_are_followed_a_few_times_and_their_bodies_not_read(monkeypatch, flood):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with OpenAIServer() as server:
        to = b"Location: %s/chat/completions\r\n" % server.base_url.encode()
        first = flood(307, to)
        assert ask(first, [question()], max_retries=0) == expected([0])
        assert first.count["sent"] < 2**25
    for_ever = flood(307, b"Location: /v1/chat/completions\r\n")
    assert "HTTP 307" in why(for_ever)
    elsewhere = flood(307, b"Location: http://localhost:1/v1/chat/completions\r\n")
    assert "redirects to another one, http://localhost: " in why(elsewhere)
