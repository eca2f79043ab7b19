"""Yes or no by the log-probabilities of the first token."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.errors import InputError, ServiceError
from rflow_jax.openai_client import UnusableAnswer
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.testing.openai_server import Chaos, Fault, OpenAIServer, decision_of, score_of
from rflow_jax.utils.images import png_bytes
from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.base import Verdict, Verifier
from rflow_jax.verifiers.config import YesNoVerifierConfig
from rflow_jax.verifiers.yesno import YesNoVerifier, decide
from tests.kit.asking import items, pictures


def score(server, images, meter=None, **more):
    config = YesNoVerifierConfig(base_url=server.base_url, **({"timeout": 10.0, "max_retries": 3} | more))
    verifier = make_verifier(config, meter)
    assert isinstance(verifier, YesNoVerifier)
    assert isinstance(verifier, Verifier)
    assert verifier.name == "yesno gpt-4o"
    try:
        return verifier.score(images, items(len(images)))
    finally:
        verifier.close()


def check(verdicts, images):
    for verdict, image in zip(verdicts, images, strict=True):
        label, logprob = decision_of(png_bytes(image))
        assert verdict.label == label
        assert verdict.score == pytest.approx(logprob)


def test_decisions_follow_the_images_and_rank_as_their_likelihood_of_yes():
    images = pictures(12)
    with OpenAIServer([Fault("reorder", seconds=0.01)]) as server:
        verdicts = score(server, images)
    check(verdicts, images)
    assert {verdict.label for verdict in verdicts} == {"yes", "no"}
    by_rank = sorted(range(12), key=lambda n: verdicts[n].rank)
    assert by_rank == sorted(range(12), key=lambda n: score_of(png_bytes(images[n])))


def test_the_request_asks_for_one_token_with_its_alternatives():
    with OpenAIServer() as server:
        score(server, pictures(1))
        (call,) = server.calls
    options = {name: call.body[name] for name in ("logprobs", "top_logprobs", "max_tokens", "temperature")}
    assert options == {"logprobs": True, "top_logprobs": 20, "max_tokens": 1, "temperature": 0}
    assert [kind for kind, _ in call.parts] == ["image", "text"]
    assert [message["role"] for message in call.body["messages"]] == ["user"]
    assert "response_format" not in call.body


def test_what_is_asked_is_a_question_the_prompt_alone_or_a_file(tmp_path):
    mine = tmp_path / "mine.md"
    mine.write_text("Show me $prompt!\n")
    texts = {}
    for template in ("question", "raw", str(mine)):
        with OpenAIServer() as server:
            score(server, pictures(1), template=template)
            texts[template] = server.calls[0].text
    assert texts["raw"] == "a photo of 0 kites"
    assert texts[str(mine)] == "Show me a photo of 0 kites!"
    assert '"a photo of 0 kites"' in texts["question"]
    assert "yes or no" in texts["question"]
    mine.write_text("Show me $promt!")
    for template, problem in ((str(mine), r"mine\.md: does not contain \$prompt"), ("qestion", "qestion: cannot read")):
        with pytest.raises(InputError, match=problem):
            YesNoVerifier(YesNoVerifierConfig(base_url="http://localhost", template=template))


def test_the_evaluation_is_words():
    images = pictures(12)
    with OpenAIServer() as server:
        verdicts = score(server, images)
    no = next(verdict for verdict in verdicts if verdict.label == "no")
    probability = f"(probability {math.exp(no.score):.2f})"
    assert f"a judge says no {probability}." in no.evaluation()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("off_schema", "neither yes nor no is among the likeliest first tokens (2 attempts)"),
        ("refusal", "the model refused: I cannot help with that. (2 attempts)"),
    ],
)
def test_what_decides_nothing_is_asked_again_and_then_an_error(kind, reason):
    images = pictures(2)
    victim = png_bytes(images[0])
    meter = UsageTracker()
    with OpenAIServer([Fault(kind, when=lambda call: call.image == victim)]) as server:
        first, second = score(server, images, meter, max_retries=1)
    assert first == Verdict(None, error=reason)
    check([second], images[1:])
    assert (meter.snapshot().attempts, meter.snapshot().failures) == (3, 1)
    assert meter.snapshot().completion_tokens > 0


def test_chaos_mixes_no_decision_up():
    images = pictures(30)
    with OpenAIServer(chaos=Chaos(0.3, hang=5.0), spread=0.05) as server:
        check(score(server, images, max_retries=12, timeout=1.0, concurrency=20), images)
        assert len(server.calls) > 35


def test_all_ways_to_write_a_word_count_together():
    ways = [("Yes", math.log(0.3)), (" yes", math.log(0.1)), ("no", math.log(0.35)), ("Maybe", math.log(0.25))]
    assert decide(ways) == ("yes", pytest.approx(math.log(0.4)))
    marked = [
        ("\u0120YES", -2.0),
        ("\u2581No", -1.0),
        ('"no', -1.5),
        ("No.", -3.0),
        ("nobody", -0.01),
        ("yesterday", 0.0),
    ]
    assert decide(marked) == ("no", pytest.approx(math.log(math.exp(-1) + math.exp(-1.5) + math.exp(-3))))


def test_one_of_the_two_is_enough_and_a_tie_is_a_no():
    assert decide([("The", -0.1), ("Yes", -4.0)]) == ("yes", -4.0)
    assert decide([("NO", -9.0)]) == ("no", -9.0)
    assert decide([("yes", -1.0), ("no", -1.0)]) == ("no", -1.0)
    for neither in ([], [("Maybe", -0.1), ("", -0.2)]):
        with pytest.raises(UnusableAnswer, match="neither"):
            decide(neither)


SPELLINGS = {
    word: [word, word.upper(), word.title(), f" {word}", f"\u2581{word}", f"{word}."] for word in ("yes", "no")
}


@given(
    st.dictionaries(st.sampled_from([*SPELLINGS["yes"], *SPELLINGS["no"], "maybe", "\n"]), st.floats(-1000, 0.0)),
    st.randoms(),
)
def test_the_likelier_word_wins_whatever_the_order_of_the_tokens(tokens, chance):
    def mass(word):
        return sum(math.exp(value) for token, value in tokens.items() if token in SPELLINGS[word])

    listed = list(tokens.items())
    chance.shuffle(listed)
    if not any(token in SPELLINGS[word] for token in tokens for word in SPELLINGS):
        with pytest.raises(UnusableAnswer):
            decide(listed)
        return
    label, found = decide(listed)
    assert -1000 <= found <= 0
    other = "no" if label == "yes" else "yes"
    assert mass(label) >= mass(other) * (1 - 1e-9)
    assert math.exp(found) == pytest.approx(min(1, mass(label)), abs=1e-12)


@given(st.lists(st.tuples(st.text(), st.floats(-1e9, 0))))
def test_any_tokens_are_decided_or_refused(tokens):
    try:
        label, found = decide(tokens)
    except UnusableAnswer:
        return
    assert label in ("yes", "no")
    assert math.isfinite(found)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [None]},
        {"content": [{"token": "Yes"}]},
        {"content": [{"token": "Yes", "logprob": None, "top_logprobs": None}]},
        {"content": [{"token": "Yes", "logprob": float("-inf"), "top_logprobs": [3]}]},
        "no",
    ],
)
def test_odd_log_probabilities_are_an_error_of_one_image(logprobs):
    class Odd(OpenAIServer):
        def respond(self, call, faults):
            reply = super().respond(call, faults)
            if call.number == 0:
                reply["choices"][0]["logprobs"] = logprobs
            return reply

    with Odd() as server:
        (verdict,) = score(server, pictures(1), max_retries=0)
    assert verdict.missing
    assert verdict.error.endswith(": the server gives no log-probabilities of the first token (1 attempt)")


def test_a_server_without_log_probabilities_is_no_finding_about_its_images():
    with (
        OpenAIServer([Fault("no_logprobs")]) as server,
        pytest.raises(ServiceError, match="gives no log-probabilities"),
    ):
        score(server, pictures(3), max_retries=0)


def test_the_chosen_token_counts_where_the_likeliest_are_not_listed():
    class Terse(OpenAIServer):
        def respond(self, call, faults):
            reply = super().respond(call, faults)
            reply["choices"][0]["logprobs"] = {"content": [{"token": "No", "logprob": -0.25, "top_logprobs": []}]}
            return reply

    with Terse() as server:
        (verdict,) = score(server, pictures(1), max_retries=0)
    assert (verdict.label, verdict.score) == ("no", -0.25)
