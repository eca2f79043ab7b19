"""Questions of many threads at once, the end of a chat, and what it has used."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rflow_jax.openai_client import Chat, ChatError, Endpoint
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.testing.openai_server import KEY, Fault, OpenAIServer
from rflow_jax.utils.batching import CLOSED
from tests.kit.asking import ask, expected, question, wait_until


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


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
    with OpenAIServer([Fault("delay", seconds=20.0, when=lambda call: "question 1" in call.text)]) as server:
        meter = UsageTracker()
        chat = Chat(Endpoint(base_url=server.base_url), meter)
        with ThreadPoolExecutor(2) as beside:
            waiting = [beside.submit(chat.ask_all, [question(0), question(1)]) for _ in range(2)]
            wait_until(lambda: len(server.calls) == 4 and meter.snapshot().in_flight == 2)
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


@pytest.mark.parametrize("fault", [Fault("status", status=429, retry_after=60), Fault("delay", seconds=60.0)])
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
    meter = UsageTracker()
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
    meter = UsageTracker()
    with OpenAIServer() as server:
        ask(server, [question()], meter)
    assert meter.snapshot().cost is None
    assert meter.snapshot().prompt_tokens > 0
    meter = UsageTracker()
    with OpenAIServer(usage=False) as server:
        ask(server, [question()], meter, price_input=1.0, price_output=1.0)
    assert meter.snapshot() == Usage(calls=1, attempts=1, unmetered=1)
