"""Grades in JSON from a real server."""

import json

import pytest

from rflow_jax.errors import InputError, ServiceError
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.testing.openai_server import KEY, Chaos, Fault, OpenAIServer, score_of
from rflow_jax.utils.batching import CLOSED
from rflow_jax.utils.images import png_bytes
from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.config import OpenAIVerifierConfig
from rflow_jax.verifiers.openai import OpenAIVerifier, excluded, required
from tests.kit.asking import TAGS, items, pictures, prompt_folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def score(server, images, meter=None, **more):
    config = OpenAIVerifierConfig(base_url=server.base_url, **({"timeout": 10.0, "max_retries": 3} | more))
    verifier = OpenAIVerifier(config, meter)
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
    assert [call.images for call in calls] == [[png_bytes(image)] for image in images]
    assert {call.model for call in calls} == {"judge-1"}
    assert {call.authorization for call in calls} == {f"Bearer {KEY}"}
    aspects = [set(call.schema["properties"]) - {"overall"} for call in calls]
    assert all(len(names) == 3 for names in aspects)
    assert len({frozenset(names) for names in aspects}) == len(TAGS)
    for number, (call, verdict) in enumerate(zip(calls, verdicts, strict=True)):
        assert f"a photo of {number} kites" in call.text
        assert "$" not in call.text
        assert call.schema["properties"]["overall"]["required"] == ["reason", "score"]
        assert list(call.form) == list(call.schema["properties"]) == list(verdict.raw)
        assert all(name in verdict.explanation and f"- {name}: " in call.text for name in aspects[number])


def test_the_evaluation_says_the_grades_and_their_reasons():
    (image,) = pictures(1)
    with OpenAIServer() as server:
        (verdict,) = score(server, [image])
    grade = f"{score_of(png_bytes(image)):g}"
    lines = verdict.evaluation().splitlines()
    assert lines[0] == f"Overall: {grade}"
    assert [line.split(" ")[0] for line in lines[1:]] == ["presence", "completeness", "focus", "overall"]
    assert all(f"({grade}/10): seen in a picture worth" in line for line in lines[1:])


def test_metadata_is_put_in_words():
    dog = {"class": "dog", "count": 1, "position": ["right of", 0]}
    item = {"include": [{"class": "teddy bear", "count": 2, "color": "red"}, dog]}
    assert required(item) == "2 x teddy bear (red); 1 x dog (right of the teddy bear)"
    assert excluded({"exclude": [{"class": "clock", "count": 3}]}) == "3 or more x clock"
    assert required({}) == "what the prompt says"
    assert excluded({}) == "whatever contradicts the prompt"
    for odd in ([1], [{"class": "x"}], {"a": 1}, [{"class": "x", "count": 1, "position": ["left of", 7]}], "owl"):
        assert (
            required({"include": odd}) == excluded({"include": [], "exclude": odd}) == json.dumps(odd)
            or odd[0]["class"]
        )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"kind": "status", "status": 500}, "HTTP 500"),
        ({"kind": "status", "status": 413}, "HTTP 413"),
        ({"kind": "drop"}, "no connection, or it broke"),
        ({"kind": "truncated"}, "the answer was cut"),
        ({"kind": "refusal"}, "the model refused"),
        ({"kind": "off_schema"}, "the answer lacks"),
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
    assert "attempt" in verdicts[2].error
    assert verdicts[2].evaluation() == "No evaluation of this image is available."
    assert all(verdict.error is None for verdict in (*verdicts[:2], *verdicts[3:]))


@pytest.mark.parametrize("refused", [["json_schema"], ["json_schema", "json_object"]])
def test_a_server_without_schemas_is_asked_in_another_way_from_then_on(refused):
    images = pictures(6)
    formats = ["json_schema", "json_object", "text"][: len(refused) + 1]
    meter = UsageTracker()
    with OpenAIServer(refuse=refused) as server:
        verdicts = score(server, images, meter, concurrency=1, max_retries=0)
        asked = [call.format for call in server.calls]
    assert [verdict.score for verdict in verdicts] == expected(images)
    assert asked == formats + [formats[-1]] * 5
    assert (meter.snapshot().calls, meter.snapshot().attempts) == (6, 6 + len(refused))
    with OpenAIServer(refuse=refused) as server:
        assert [verdict.score for verdict in score(server, images, concurrency=6, max_retries=0)] == expected(images)


def test_a_server_that_ignores_schemas_still_reads_the_form():
    class Deaf(OpenAIServer):
        def log(self, call):
            del call.body["response_format"]
            return super().log(call)

    images = pictures(2)
    with Deaf() as server:
        assert [verdict.score for verdict in score(server, images, max_retries=0)] == expected(images)
        assert {call.format for call in server.calls} == {"text"}


@pytest.mark.parametrize("structured", ["json_schema", "json_object", "text"])
def test_the_way_to_ask_can_be_fixed(structured):
    with OpenAIServer() as server:
        score(server, pictures(2), structured=structured)
        assert {call.format for call in server.calls} == {structured}
    if structured != "text":
        refused = pytest.raises(ServiceError, match=f"HTTP 400: response_format: {structured} is not supported")
        with OpenAIServer(refuse=[structured]) as server, refused:
            score(server, pictures(1), structured=structured)


def test_a_bad_request_for_another_reason_does_not_loosen_the_form():
    bad = Fault("status", status=400, message="schema of the image is wrong", times=3)
    with OpenAIServer([bad]) as server:
        verdicts = score(server, pictures(2), concurrency=1)
        assert verdicts[0].error.startswith("HTTP 400")
        assert verdicts[1].scored
        # The third is of the first question, which every server should answer.
        assert [call.format for call in server.calls] == ["json_schema", "json_object", "text", *["json_schema"] * 2]


@pytest.mark.parametrize("status", [400, 422])
def test_only_a_complaint_about_the_form_changes_it(status):
    fault = Fault("status", status=status, message="the image is too large", times=1)
    with OpenAIServer([fault]) as server:
        (verdict,) = score(server, pictures(1))
        assert verdict.error == f"HTTP {status}: the image is too large (1 attempt)"
        assert [call.format for call in server.calls] == ["json_schema"] * 2


def test_chaos_loses_no_score_and_mixes_none_up():
    images = pictures(60)
    meter = UsageTracker()
    with OpenAIServer(chaos=Chaos(0.3, hang=5.0), spread=0.05) as server:
        verdicts = score(server, images, meter, max_retries=12, timeout=1.0, concurrency=30)
        struck = len(server.calls) - 60
    assert [verdict.score for verdict in verdicts] == expected(images)
    # A request that was given up while it was still being sent is an attempt that the server has not seen.
    assert 15 < struck <= meter.snapshot().attempts - 60
    assert meter.snapshot().failures == 0


@pytest.mark.parametrize("judge", ["Be strict.\n- $aspects", "$form\nBe strict."])
def test_prompts_can_be_replaced_and_the_form_is_always_said(tmp_path, judge):
    with OpenAIServer(refuse=["json_schema", "json_object"]) as server:
        (verdict,) = score(server, pictures(1), prompts=prompt_folder(tmp_path, judge))
        text = server.calls[-1].text
    assert text.endswith("\nQ: a photo of 0 kites $5")
    assert "Be strict.\n" in text
    assert text.count("Answer with one JSON object of this form and nothing else") == 1
    assert set(verdict.raw) == {"sharpness", "overall"}


@pytest.mark.parametrize(
    "content", ["[]", '{"default": 3}', "{", '{"counting": {"a": "b"}}', '{"default": {"overall": ""}}']
)
def test_unusable_aspects_are_one_line(tmp_path, content):
    with pytest.raises(InputError, match=r"aspects\.json: ") as caught:
        OpenAIVerifier(
            OpenAIVerifierConfig(base_url="http://localhost", prompts=prompt_folder(tmp_path, aspects=content))
        )
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"judge\.md: cannot read"):
        OpenAIVerifier(OpenAIVerifierConfig(base_url="http://localhost", prompts=str(tmp_path / "none")))
    (tmp_path / "judge.md").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"judge\.md: .* not UTF-8"):
        OpenAIVerifier(OpenAIVerifierConfig(base_url="http://localhost", prompts=str(tmp_path)))


def test_model_address_and_key_come_from_the_environment(monkeypatch):
    with OpenAIServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_MODEL", "from-env")
        monkeypatch.setenv("MY_KEY", "k-123")
        verifier = OpenAIVerifier(OpenAIVerifierConfig(api_key_env="MY_KEY"))
        assert verifier.name == "openai from-env"
        assert verifier.score(pictures(1), items(1))[0].scored
        verifier.close()
        assert (server.calls[0].model, server.calls[0].authorization) == ("from-env", "Bearer k-123")


def test_it_follows_the_protocol_and_gives_up_when_closed():
    with OpenAIServer() as server:
        verifier = make_verifier(OpenAIVerifierConfig(base_url=server.base_url, concurrency=5, model="m"))
        assert isinstance(verifier, Verifier)
        assert (verifier.name, verifier.concurrency, verifier.batch_size) == ("openai m", 5, 1)
        verifier.close()
        verifier.close()
        assert [verdict.error for verdict in verifier.score(pictures(2), items(2))] == [CLOSED, CLOSED]


@pytest.mark.parametrize("tag", [["colors"], {}, 3, None])
def test_a_tag_that_is_no_text_is_none(tag):
    (image,) = pictures(1)
    verifier = OpenAIVerifier(OpenAIVerifierConfig())
    item = {"prompt": "a cat", "include": [{"class": "cat", "count": 1, "position": ["left"]}], "exclude": "x"}
    without = verifier.question(image, item)
    assert verifier.question(image, item | {"tag": tag}).messages == without.messages
    verifier.close()
