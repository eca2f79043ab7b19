"""The client against a real server, with what goes wrong on real ones."""

import contextlib
import random
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.errors import ServiceError
from rflow_jax.openai_client import Chat, ChatError, Endpoint, UnusableAnswer
from rflow_jax.openai_client.retry import LONGEST_RETRY_AFTER, retry_after
from rflow_jax.testing.openai_server import KEY, Fault, OpenAIServer
from tests.kit.asking import ask, expected, question


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_answers_come_in_the_order_of_questions_though_the_server_has_another():
    with OpenAIServer([Fault("reorder", seconds=0.02)]) as server:
        assert ask(server, [question(n) for n in range(12)]) == expected(range(12))
        assert len(server.calls) == 12


PASSING = {
    "408": {"kind": "status", "status": 408},
    "409": {"kind": "status", "status": 409},
    "429": {"kind": "status", "status": 429, "retry_after": 0.05},
    "500": {"kind": "status", "status": 500},
    "502": {"kind": "status", "status": 502},
    "503": {"kind": "status", "status": 503},
    "529": {"kind": "status", "status": 529},
    "drop": {"kind": "drop"},
    "cut body": {"kind": "cut_body"},
    "half body": {"kind": "half_body"},
    "cut answer": {"kind": "truncated"},
    "refusal": {"kind": "refusal"},
    "empty": {"kind": "empty"},
    "late": {"kind": "delay", "seconds": 5.0},
}


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_is_asked_again(name):
    fault = Fault(times=1, **PASSING[name])
    with OpenAIServer([fault]) as server:
        assert ask(server, [question(n) for n in range(2)], timeout=0.6) == expected(range(2))
        assert fault.struck == 1
        assert len(server.calls) == 3


LASTING = {
    "500": "HTTP 500: out of order, key ***",
    "drop": "no connection, or it broke: Server disconnected",
    "half body": "no connection, or it broke: peer closed connection",
    "cut body": "the server's reply is not a chat completion",
    "cut answer": "the answer was cut at the limit of tokens; raise max_tokens",
    "refusal": "the model refused: I cannot help with that.",
    "empty": "the answer is empty",
    "late": "no answer within 0.3 s",
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_is_an_error_of_its_own_question_and_says_how_often_it_was_tried(name):
    with OpenAIServer([Fault(when=lambda call: "question 1" in call.text, **PASSING[name])]) as server:
        first, second, third = ask(server, [question(n) for n in range(3)], max_retries=1, timeout=0.3)
        assert len(server.calls) == 4 + (name == "cut body")  # then another is asked again
    assert [first, third] == expected([0, 2])
    assert isinstance(second, ChatError)
    assert second.missing == (name not in ("cut answer", "refusal", "empty"))
    service = f"gpt-4o at {server.base_url}: " if second.missing else ""
    assert str(second).startswith(service + LASTING[name])
    assert str(second).endswith(" (2 attempts)")
    assert "\n" not in str(second)


@pytest.mark.parametrize("status", [400, 403, 413, 422, 451])
def test_a_question_that_is_refused_is_a_finding_if_another_is_answered_again(status):
    reasons = {403: "the key in OPENAI_API_KEY may not do this: "}
    fault = Fault("status", status=status, when=lambda call: "question 1" in call.text, message="content_filter")
    with OpenAIServer([fault]) as server:
        first, second, third = ask(server, [question(n) for n in range(3)], concurrency=1)
        assert fault.struck == 1
        assert len(server.calls) == 4
    assert [first, third] == expected([0, 2])
    assert str(second) == f"HTTP {status}: {reasons.get(status, '')}content_filter (1 attempt)"
    assert not second.missing


ENDED = {
    "400": {"status": 400, "message": "Your credit balance is too low to access the API."},
    "403": {"status": 403, "message": "Your access was terminated for a violation of our content policy."},
    "418": {"status": 418, "message": "no"},
    "quota": {"status": 429, "message": "no quota", "code": "insufficient_quota"},
    "type": {"status": 400, "message": "limit", "code": None, "type": "billing_hard_limit_reached"},
    "words": {"status": 429, "message": "Insufficient balance on this account"},
    "503": {"status": 503, "message": "this account is suspended", "code": "error"},
    "key": {"status": 400, "message": "API key expired"},
    "inside": {"status": 200, "message": "Your credit balance is too low"},
    "unfit": {"status": 200, "page": "<!DOCTYPE html><html><title>Sign in</title>"},
}


class Ending(OpenAIServer):
    """A server that refuses all questions from the fourth on."""

    def __init__(self, name):
        super().__init__()
        self.ended = ENDED[name]

    def refusal(self, call):
        return dict(self.ended) if call.number >= 3 else None


@pytest.mark.parametrize("name", ENDED)
def test_refusals_that_begin_in_the_middle_end_all_and_are_no_findings(name, monkeypatch):
    monkeypatch.setattr("rflow_jax.openai_client.retry._FIRST_PAUSE", 0.01)
    with Ending(name) as server:
        chat = Chat(Endpoint(base_url=server.base_url, concurrency=1, max_retries=1))
        assert chat.ask_all([question(n) for n in range(3)]) == expected(range(3))
        begin = time.monotonic()
        for n in range(3, 6):
            with pytest.raises(ServiceError, match=f"^gpt-4o at {server.base_url}: ") as caught:
                chat.ask_all([question(n)])
        chat.close()
        assert time.monotonic() - begin < 5
    assert ENDED[name].get("message", "a web page ('Sign in')") in str(caught.value)
    assert len(server.calls) <= 8


def test_of_many_refused_at_once_none_is_a_finding_and_few_are_asked_again():
    with OpenAIServer([Fault("status", status=403, when=lambda call: call.number >= 8)], delay=0.05) as server:
        chat = Chat(Endpoint(base_url=server.base_url, concurrency=8))
        assert chat.ask_all([question(n) for n in range(8)]) == expected(range(8))
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(chat.ask_all, [question(n)]) for n in range(8, 16)]
            assert {type(one.exception()) for one in asked} == {ServiceError}
        chat.close()
    assert len(server.calls) == 8 + 8 + 1


def test_a_refused_question_is_asked_about_again_if_another_has_no_answer_now(monkeypatch):
    """Nothing is known: the question is neither a finding, nor is the service to blame."""
    monkeypatch.setattr("rflow_jax.openai_client.retry._FIRST_PAUSE", 0.01)
    faults = [Fault("status", status=400, when=lambda call: "question 1" in call.text)]
    with OpenAIServer(faults) as server:
        chat = Chat(Endpoint(base_url=server.base_url, max_retries=0))
        chat.ask_all([question(0)])
        faults = [Fault("status", status=500, when=lambda call: "question 0" in call.text)]
        server.faults += faults
        (answer,) = chat.ask_all([question(1)])
        chat.close()
    assert answer.missing
    assert faults[0].struck == 3


def test_answers_that_become_unusable_for_all_end_all(monkeypatch):
    monkeypatch.setattr("rflow_jax.openai_client.retry._FIRST_PAUSE", 0.01)
    with OpenAIServer([Fault("empty", when=lambda call: call.number >= 2)]) as server:
        chat = Chat(Endpoint(base_url=server.base_url, concurrency=1, max_retries=0))
        answers = [chat.ask_all([question(n)])[0] for n in range(4)]
        with pytest.raises(ServiceError, match=r"the answer is empty .*, also to a question that was answered before"):
            chat.ask_all([question(4)])
        chat.close()
    assert [type(answer) for answer in answers] == [str, str, ChatError, ChatError]


REFUSED = {
    "HTTP 401: the key in OPENAI_API_KEY is not accepted (1 attempt)": {"status": 401},
    "HTTP 402: the account has no credit left: out of order, key *** (1 attempt)": {"status": 402},
    "HTTP 404: no model gpt-4o here, or a wrong base_url: out of order, key *** (1 attempt)": {"status": 404},
    "HTTP 405: out of order, key *** (1 attempt)": {"status": 405},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_every_question_would_be_refused_for_ends_all_at_once(reason):
    with OpenAIServer([Fault("status", **REFUSED[reason], when=lambda call: call.number >= 2)]) as server:
        chat = Chat(Endpoint(base_url=server.base_url, concurrency=1))
        with pytest.raises(ServiceError, match=re.escape(reason)):
            chat.ask_all([question(n) for n in range(8)])
        with pytest.raises(ServiceError, match=re.escape(reason)):
            chat.ask_all([question()])
        chat.close()
        assert len(server.calls) == 3


@pytest.mark.parametrize("status", [400, 403, 422])
def test_settings_that_are_refused_from_the_beginning_end_all(status):
    with OpenAIServer([Fault("status", status=status)]) as server:
        with pytest.raises(ServiceError, match=f"HTTP {status}"):
            ask(server, [question(n) for n in range(8)], concurrency=1)
        assert len(server.calls) <= 4


@pytest.mark.parametrize("name", ["429", "503", "500", "drop"])
def test_a_server_that_is_away_is_waited_for(name, monkeypatch, caplog):
    monkeypatch.setattr("rflow_jax.openai_client.client.LONGEST_PAUSE", 0.02)
    fault = Fault(times=15, **PASSING[name] | ({"retry_after": 0.001} if name == "429" else {}))
    with OpenAIServer([fault]) as server:
        answers = ask(server, [question(n) for n in range(5)], max_retries=0, concurrency=1)
        missing = [n for n, answer in enumerate(answers) if isinstance(answer, ChatError)]
        assert missing == ([] if name in ("429", "503") else [0, 1])  # these may be for the question
        assert all(answers[n].missing for n in missing)
        assert [answer for answer in answers if isinstance(answer, str)] == expected(set(range(5)) - set(missing))
    assert ["waiting up to" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_answers_others_is_not_away_however_many_questions_have_no_answer(status, monkeypatch):
    """One that was answered before is asked again to find out."""
    monkeypatch.setattr("rflow_jax.openai_client.client.LONGEST_PAUSE", 0.02)
    with OpenAIServer([Fault("status", status=status, when=lambda call: "question 0" not in call.text)]) as server:
        chat = Chat(Endpoint(base_url=server.base_url, max_retries=0, concurrency=1))
        begin = time.monotonic()
        assert chat.ask_all([question()]) == expected([0])
        answers = chat.ask_all([question(n) for n in range(1, 9)])
        chat.close()
        assert time.monotonic() - begin < 5
    assert all(answer.missing for answer in answers)
    assert 2 <= sum("question 0" in call.text for call in server.calls) <= 5


def test_a_server_that_is_away_for_too_long_ends_all(monkeypatch):
    monkeypatch.setattr("rflow_jax.openai_client.client.LONGEST_PAUSE", 0.02)
    with OpenAIServer([Fault("status", status=503, when=lambda call: call.number >= 2)]) as server:
        begin = time.monotonic()
        with pytest.raises(ServiceError, match=r"HTTP 503: .*; no answer for [01] s"):
            ask(server, [question(n) for n in range(8)], max_retries=0, patience=0.3, concurrency=2)
        assert 0.3 < time.monotonic() - begin < 5


def test_patience_begins_when_the_server_fails_not_when_it_was_asked_last(monkeypatch):
    monkeypatch.setattr("rflow_jax.openai_client.client.LONGEST_PAUSE", 0.02)
    with OpenAIServer([Fault("status", status=503, when=lambda call: 1 <= call.number < 3)]) as server:
        chat = Chat(Endpoint(base_url=server.base_url, max_retries=0, patience=0.5))
        assert chat.ask_all([question()]) == expected([0])
        time.sleep(0.6)
        assert chat.ask_all([question(1)]) == expected([1])
        chat.close()


def test_no_server_at_all():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    server = type("Server", (), {"base_url": f"http://127.0.0.1:{port}/v1"})
    with pytest.raises(ServiceError, match="no connection, or it broke"):
        ask(server, [question()], max_retries=0, patience=0)


def test_faults_of_every_kind_draw_on_one_budget():
    kinds = ["429", "drop", "refusal", "half body", "empty", "500"]
    faults = [Fault(times=1, **PASSING[kind], when=lambda call, n=n: call.attempt == n) for n, kind in enumerate(kinds)]
    with OpenAIServer(faults) as server:
        (answer,) = ask(server, [question()], max_retries=4)
        assert str(answer) == "the answer is empty (5 attempts)"
        assert len(server.calls) == 5


def test_an_answer_that_the_question_refuses_is_asked_again():
    seen = []

    def parse(answer):
        seen.append(answer.text)
        if len(seen) < 3:
            raise UnusableAnswer("not yet")
        return "now"

    with OpenAIServer() as server:
        assert ask(server, [question(parse=parse)]) == ["now"]
        assert seen == expected([0]) * 3


def test_a_server_that_dribbles_is_given_up_in_time():
    """The limit is for the whole answer, not for the time between two bytes of it."""

    def dribble(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                time.sleep(0.05)
                connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=dribble, args=(listener,), daemon=True).start()
        server = type("Server", (), {"base_url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"})
        begin = time.monotonic()
        (answer,) = ask(server, [question()], max_retries=0, timeout=0.4)
        assert str(answer) == f"gpt-4o at {server.base_url}: no answer within 0.4 s (1 attempt)"
        assert time.monotonic() - begin < 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(form):
    # A date has whole seconds: two from now is between one and two.
    asked = 1.2 if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    with OpenAIServer([Fault("status", times=1, status=429, retry_after=asked)]) as server:
        begin = time.monotonic()
        assert ask(server, [question()]) == expected([0])
        assert (1.2 if form == "seconds" else 1.7) <= time.monotonic() - begin < 6


def test_without_retry_after_the_pauses_are_short_at_first_and_random():
    random.seed(5)
    pauses = []
    with OpenAIServer([Fault("status", times=1, status=503)]) as server:
        for _ in range(4):
            server.faults[0].struck = 0
            begin = time.monotonic()
            ask(server, [question()])
            pauses.append(time.monotonic() - begin)
    assert max(pauses) < 1.5
    assert max(pauses) - min(pauses) > 0.02


def test_retry_after_has_a_limit_and_nonsense_is_no_wait():
    past = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    for value in ("soon", "", "nan", "inf", "-3", past, "Mon, 99 Foo 2026 00:00:00 GMT"):
        assert retry_after({"retry-after": value}) == 0
    assert retry_after({}) == 0
    assert retry_after({"retry-after": "86400"}) == LONGEST_RETRY_AFTER
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after-ms": "250", "retry-after": "1"}) == 0.25
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 < retry_after({"retry-after": soon}) <= 30


@given(st.text())
def test_no_retry_after_is_an_error(value):
    assert 0 <= retry_after({"retry-after": value}) <= LONGEST_RETRY_AFTER


def test_thoughts_of_a_reasoning_model_are_no_answer_and_lone_surrogates_no_text():
    class Thinker(OpenAIServer):
        def respond(self, call, faults):
            reply = super().respond(call, faults)
            reply["choices"][0]["message"]["content"] = "<think>\nHm, {x}.\n</think>\n\nDone \ud83d."
            return reply

    with Thinker() as server:
        assert ask(server, [question(parse=lambda answer: answer.require_text().strip())]) == ["Done ?."]
