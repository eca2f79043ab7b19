"""The verifier against a real server, with what goes wrong on real ones."""

import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from rflow_jax.chat import png_bytes
from rflow_jax.errors import InputError
from rflow_jax.verifiers.openai import OpenAIVerifier, VerifierConfig
from tests.kit.openai_server import KEY, Fault, OpenAIServer, score_of

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "default")


def pictures(count: int) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(0)
    return [PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def items(count: int) -> list[dict]:
    return [{"prompt": f"a photo of {number} kites", "tag": TAGS[number % len(TAGS)]} for number in range(count)]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def score(server, images, max_retries=3, **more):
    config = VerifierConfig(base_url=server.base_url, max_retries=max_retries, **({"timeout": 10.0} | more))
    verifier = OpenAIVerifier(config)
    try:
        return verifier.score(images, items(len(images)))
    finally:
        verifier.close()


def expected(images):
    return [score_of(png_bytes(image)) for image in images]


def test_scores_come_in_request_order_though_answers_do_not():
    images = pictures(12)
    with OpenAIServer([Fault("reorder", seconds=0.02)]) as server:
        verdicts = score(server, images, concurrency=8)
        assert [verdict.score for verdict in verdicts] == expected(images)
        assert 1 < server.most_at_once <= 8
        assert len(server.calls) == 12


def test_a_question_carries_image_prompt_aspects_of_its_tag_and_schema():
    images = pictures(len(TAGS))
    with OpenAIServer() as server:
        verdicts = score(server, images, model="judge-1", concurrency=1)
        calls = server.calls
    assert [call.image for call in calls] == [png_bytes(image) for image in images]
    assert {call.model for call in calls} == {"judge-1"}
    assert {call.authorization for call in calls} == {f"Bearer {KEY}"}
    aspects = [set(call.schema["properties"]) - {"overall"} for call in calls]
    assert all(len(names) == 3 for names in aspects)
    assert len({frozenset(names) for names in aspects}) == len(TAGS)
    for number, (call, verdict) in enumerate(zip(calls, verdicts, strict=True)):
        assert f"a photo of {number} kites" in call.text
        assert call.schema["properties"]["overall"]["required"] == ["reason", "score"]
        assert set(verdict.raw) == {*aspects[number], "overall"}
        assert all(name in verdict.explanation and name in call.text for name in aspects[number])


FAULTS = {
    "429": Fault("status", times=2, status=429, retry_after=0.05),
    "408": Fault("status", times=1, status=408, retry_after=0.05),
    "409": Fault("status", times=1, status=409, retry_after=0.05),
    "503": Fault("status", times=2, status=503, retry_after=0.05),
    "drop": Fault("drop", times=1),
    "truncated": Fault("truncated", times=2),
    "cut body": Fault("cut_body", times=1),
    "refusal": Fault("refusal", times=1),
    "off schema": Fault("off_schema", times=1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_passing_fault_is_retried(name):
    images = pictures(4)
    fault = Fault(**{key: value for key, value in vars(FAULTS[name]).items() if key != "struck"})
    with OpenAIServer([fault]) as server:
        verdicts = score(server, images)
        assert [verdict.score for verdict in verdicts] == expected(images)
        assert fault.struck == fault.times
        assert len(server.calls) == 4 + fault.times


def test_retry_after_is_honoured():
    with OpenAIServer([Fault("status", times=1, status=429, retry_after=1.2)]) as server:
        begin = time.monotonic()
        score(server, pictures(1))
        assert time.monotonic() - begin >= 1.2


def test_a_slow_answer_is_given_up_and_asked_again():
    images = pictures(1)
    with OpenAIServer([Fault("delay", times=1, seconds=5)]) as server:
        begin = time.monotonic()
        assert [verdict.score for verdict in score(server, images, timeout=0.3)] == expected(images)
        assert time.monotonic() - begin < 4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"kind": "status", "status": 500, "retry_after": 0.01}, "500"),
        ({"kind": "status", "status": 401}, "401"),
        ({"kind": "drop"}, "Connection error"),
        ({"kind": "truncated"}, "does not fit its schema"),
        ({"kind": "refusal"}, "refused"),
        ({"kind": "off_schema"}, "lacks"),
        ({"kind": "cut_body"}, "not a chat completion"),
    ],
)
def test_a_lasting_fault_leaves_exactly_its_own_image_unscored(fault, reason):
    images = pictures(5)
    victim = png_bytes(images[2])
    with OpenAIServer([Fault(when=lambda call: call.image == victim, **fault)]) as server:
        verdicts = score(server, images, max_retries=1)
    wanted = expected(images)
    assert [verdict.score for verdict in verdicts] == [*wanted[:2], None, *wanted[3:]]
    assert reason in verdicts[2].error
    assert "\n" not in verdicts[2].error
    assert KEY not in verdicts[2].error
    assert all(verdict.error is None for verdict in (*verdicts[:2], *verdicts[3:]))


def test_prompts_can_be_replaced(tmp_path):
    (tmp_path / "judge.md").write_text("Be strict.\n$aspects")
    (tmp_path / "question.md").write_text("Q: $prompt")
    (tmp_path / "aspects.json").write_text('{"default": {"sharpness": "Nothing is blurred."}}')
    with OpenAIServer() as server:
        (verdict,) = score(server, pictures(1), prompts=str(tmp_path))
        assert server.calls[0].text == "Be strict.\n- sharpness: Nothing is blurred.\nQ: a photo of 0 kites"
    assert set(verdict.raw) == {"sharpness", "overall"}


@pytest.mark.parametrize("content", ["[]", '{"default": 3}', "{", '{"counting": {"a": "b"}}'])
def test_unusable_aspects_are_one_line(tmp_path, content):
    for name in ("judge.md", "question.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "aspects.json").write_text(content)
    with pytest.raises(InputError, match=r"aspects\.json: ") as caught:
        OpenAIVerifier(VerifierConfig(base_url="http://localhost", prompts=str(tmp_path)))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"judge\.md: cannot read"):
        OpenAIVerifier(VerifierConfig(base_url="http://localhost", prompts=str(tmp_path / "none")))


def test_model_address_and_key_come_from_the_environment(monkeypatch):
    with OpenAIServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_MODEL", "from-env")
        monkeypatch.setenv("MY_KEY", "k-123")
        verifier = OpenAIVerifier(VerifierConfig(api_key_env="MY_KEY"))
        assert verifier.score(pictures(1), items(1))[0].scored
        verifier.close()
        assert (server.calls[0].model, server.calls[0].authorization) == ("from-env", "Bearer k-123")


def test_a_missing_key_is_bad_input_for_openai_only(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        OpenAIVerifier(VerifierConfig())
    OpenAIVerifier(VerifierConfig(base_url="http://localhost:1")).close()


def test_a_key_in_the_place_of_its_variable_is_refused_unseen():
    with pytest.raises(InputError) as caught:
        VerifierConfig(api_key_env="sk-secret")
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0.0}, {"concurrency": 0}, {"max_retries": -1}, {"base_url": "localhost"}]
)
def test_impossible_settings_are_bad_input(wrong):
    with pytest.raises(InputError):
        VerifierConfig(**wrong)


def test_closing_gives_up_what_is_waiting():
    with OpenAIServer([Fault("delay", seconds=20)]) as server:
        verifier = OpenAIVerifier(VerifierConfig(base_url=server.base_url, max_retries=0))
        with ThreadPoolExecutor(1) as beside:
            waiting = beside.submit(verifier.score, pictures(2), items(2))
            while not server.calls:
                time.sleep(0.01)
            begin = time.monotonic()
            verifier.close()
            assert isinstance(waiting.exception(timeout=5), CancelledError)
            assert time.monotonic() - begin < 5
        verifier.close()


def test_closing_again_at_once_returns():
    with OpenAIServer([]) as server:
        for _ in range(50):
            verifier = OpenAIVerifier(VerifierConfig(base_url=server.base_url))
            verifier.close()
            verifier.close()
