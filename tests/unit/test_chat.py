"""The client against a real server, with what goes wrong on real ones."""

import contextlib
import logging
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.chat import CLOSED, Chat, ChatError, Endpoint, UnusableAnswer, png_bytes
from rflow_jax.chat.trouble import LONGEST_RETRY_AFTER, retry_after
from rflow_jax.errors import InputError
from rflow_jax.usage import Meter, Usage
from tests.kit.asking import ask, pictures, question, wait_until
from tests.kit.openai_server import KEY, Fault, OpenAIServer, sentence_of


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def expected(numbers) -> list[str]:
    return [sentence_of(png_bytes(pictures(1, n)[0]), f"Be brief.\nquestion {n}") for n in numbers]


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
    "429": "HTTP 429: too many requests, or no quota left: out of order, key ***",
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
        assert len(server.calls) == 4
    assert [first, third] == expected([0, 2])
    assert isinstance(second, ChatError)
    assert str(second).startswith(LASTING[name])
    assert str(second).endswith(" (2 attempts)")
    assert "\n" not in str(second)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, "HTTP 400: out of order, key *** (1 attempt)"),
        (401, "HTTP 401: the key in OPENAI_API_KEY is not accepted (1 attempt)"),
        (403, "HTTP 403: the key in OPENAI_API_KEY may not do this: out of order, key *** (1 attempt)"),
        (404, "HTTP 404: no model gpt-4o here, or a wrong base_url: out of order, key *** (1 attempt)"),
        (413, "HTTP 413: out of order, key *** (1 attempt)"),
        (422, "HTTP 422: out of order, key *** (1 attempt)"),
    ],
)
def test_what_asking_again_cannot_mend_is_asked_once(status, reason):
    with OpenAIServer([Fault("status", status=status)]) as server:
        (answer,) = ask(server, [question()])
        assert str(answer) == reason
        assert len(server.calls) == 1


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
        assert str(answer) == "no answer within 0.4 s (1 attempt)"
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


def test_at_most_concurrency_requests_are_in_flight_over_all_threads():
    with OpenAIServer([Fault("delay", seconds=0.05)]) as server:
        chat = Chat(Endpoint(base_url=server.base_url, concurrency=3))
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: chat.ask_all([question(n), question(n + 8)]), range(8)))
        chat.close()
        assert server.most_at_once == 3
    assert answers == [expected([n, n + 8]) for n in range(8)]


def test_a_question_that_waits_to_be_asked_again_blocks_no_other():
    busy = Fault("status", status=429, retry_after=2, times=1, when=lambda call: "question 0" in call.text)
    with OpenAIServer([busy]) as server:
        chat = Chat(Endpoint(base_url=server.base_url, concurrency=1))
        with ThreadPoolExecutor(2) as pool:
            slow = pool.submit(chat.ask_all, [question(0)])
            wait_until(lambda: len(server.calls) == 1)
            assert pool.submit(chat.ask_all, [question(1)]).result(timeout=1.5) == expected([1])
            assert slow.result() == expected([0])
        chat.close()


def test_closing_returns_what_is_there_and_gives_up_the_rest():
    with OpenAIServer([Fault("delay", seconds=20, when=lambda call: "question 1" in call.text)]) as server:
        meter = Meter()
        chat = Chat(Endpoint(base_url=server.base_url), meter)
        with ThreadPoolExecutor(2) as beside:
            waiting = [beside.submit(chat.ask_all, [question(0), question(1)]) for _ in range(2)]
            wait_until(lambda: meter.snapshot().prompt_tokens and len(server.calls) == 4 and server.most_at_once)
            wait_until(lambda: meter.snapshot().in_flight == 2)
            begin = time.monotonic()
            chat.close()
            for answers in waiting:
                first, second = answers.result(timeout=5)
                assert [first] == expected([0])
                assert (type(second), str(second)) == (ChatError, CLOSED)
            assert time.monotonic() - begin < 3
        assert meter.snapshot().in_flight == 0
        assert [str(answer) for answer in chat.ask_all([question()])] == [CLOSED]
        assert len(server.calls) == 4


@pytest.mark.parametrize("fault", [Fault("status", status=429, retry_after=60), Fault("delay", seconds=60)])
def test_closing_ends_pauses_and_those_who_wait_for_their_turn(fault):
    with OpenAIServer([fault]) as server:
        chat = Chat(Endpoint(base_url=server.base_url, concurrency=1))
        with ThreadPoolExecutor(4) as beside:
            waiting = [beside.submit(chat.ask_all, [question(n)]) for n in range(4)]
            wait_until(lambda: len(server.calls) >= 1)
            begin = time.monotonic()
            chat.close()
            assert {str(answers.result(timeout=5)[0]) for answers in waiting} == {CLOSED}
            assert time.monotonic() - begin < 3


def test_closing_at_any_moment_and_twice_at_once_returns():
    with OpenAIServer() as server:
        for _ in range(30):
            chat = Chat(Endpoint(base_url=server.base_url))
            with ThreadPoolExecutor(4) as beside:
                asked = beside.submit(chat.ask_all, [question()])
                for closed in [beside.submit(chat.close) for _ in range(2)]:
                    closed.result(timeout=5)
                (answer,) = asked.result(timeout=5)
            assert answer == expected([0])[0] or str(answer) == CLOSED


def test_tokens_and_cost_count_for_answers_that_cannot_be_used_too():
    fault = Fault("refusal", when=lambda call: "question 1" in call.text)
    meter = Meter()
    with OpenAIServer([fault, Fault("drop", times=1)]) as server:
        ask(server, [question(0), question(1)], meter, max_retries=2, price_input=2.0, price_output=8.0, concurrency=1)
        answered = [call for call in server.calls if call.number != 0]  # the first was dropped
        paid = [server.respond(call, server.faults_for(call))["usage"] for call in answered]
    used = meter.snapshot()
    assert (used.calls, used.attempts, used.failures, used.in_flight, used.unmetered) == (2, 5, 1, 0, 0)
    assert used.prompt_tokens == sum(one["prompt_tokens"] for one in paid) > 0
    assert used.completion_tokens == sum(one["completion_tokens"] for one in paid) > 0
    assert used.cost == pytest.approx(2e-6 * used.prompt_tokens + 8e-6 * used.completion_tokens)


def test_without_prices_the_cost_is_unknown_and_without_counts_the_answers_are_counted():
    meter = Meter()
    with OpenAIServer() as server:
        ask(server, [question()], meter)
    assert meter.snapshot().cost is None
    assert meter.snapshot().prompt_tokens > 0
    meter = Meter()
    with OpenAIServer(usage=False) as server:
        ask(server, [question()], meter, price_input=1.0, price_output=1.0)
    assert meter.snapshot() == Usage(calls=1, attempts=1, unmetered=1)


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
        chat = Chat(Endpoint(base_url=server.base_url, max_retries=0))
        (answer,) = chat.ask_all([question()])
        chat.close()
    captured = capfd.readouterr()
    shown = "\n".join((repr(answer), repr(chat), repr(vars(chat)), captured.out, captured.err, caplog.text))
    assert str(status) in str(answer)
    assert answer.__cause__ is None
    assert answer.__context__ is None
    assert not [
        shown[max(0, at - 40) : at + 20] for part in (KEY[:5], KEY[-4:], KEY[5:13]) if (at := shown.find(part)) >= 0
    ]


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
    endpoint = Endpoint(base_url="http://me:hidden-word@127.0.0.1:9/v1", max_retries=0)
    assert "hidden-word" not in repr(endpoint)
    chat = Chat(endpoint)
    assert "hidden-word" not in str(chat.ask_all([question()])[0])
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
    with pytest.raises(InputError, match="OPENAI_API_KEY holds characters") as caught:
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


def test_thoughts_of_a_reasoning_model_are_no_answer_and_lone_surrogates_no_text():
    class Thinker(OpenAIServer):
        def respond(self, call, faults):
            reply = super().respond(call, faults)
            reply["choices"][0]["message"]["content"] = "<think>\nHm, {x}.\n</think>\n\nDone \ud83d."
            return reply

    with Thinker() as server:
        assert ask(server, [question(parse=lambda answer: answer.words().strip())]) == ["Done ?."]
