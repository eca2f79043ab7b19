"""Reflections and refined prompts from a real server."""

from dataclasses import replace

import pytest

from rflow_jax.errors import InputError
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.testing.openai_server import Chaos, Fault, OpenAIServer, sentence_of
from rflow_jax.utils.batching import CLOSED
from rflow_jax.utils.images import png_bytes
from rflow_jax.writers import REFINE_PROMPT, REFLECTION_PROMPT, make_text_generator
from rflow_jax.writers.base import PastImage, TextGenerator, WriterInput
from rflow_jax.writers.http import HttpTextGenerator, HttpTextGeneratorConfig
from tests.kit.asking import pictures


def cases(count: int) -> list[WriterInput]:
    return [
        WriterInput(
            image=image,
            prompt=f"original {number}",
            current_prompt=f"current {number}",
            evaluation=f"graded {number}",
            last_reflection=f"last {number}",
        )
        for number, image in enumerate(pictures(count, seed=1))
    ]


def write(server, asked, default=REFLECTION_PROMPT, meter=None, **more):
    config = HttpTextGeneratorConfig(base_url=server.base_url, **({"max_retries": 1, "timeout": 10.0} | more))
    writer = HttpTextGenerator(config, default, meter)
    try:
        return writer.write(asked)
    finally:
        writer.close()


@pytest.mark.parametrize("default", [REFLECTION_PROMPT, REFINE_PROMPT])
def test_texts_come_in_order_and_follow_from_image_and_case(default):
    asked = cases(6)
    with OpenAIServer([Fault("reorder", seconds=0.02)]) as server:
        texts = write(server, asked, default)
        by_image = {call.image: call for call in server.calls}
    for number, (case, written) in enumerate(zip(asked, texts, strict=True)):
        call = by_image[png_bytes(case.image)]
        assert call.images == [png_bytes(case.image)]
        assert call.role == "write"
        assert written.text == sentence_of(call.image, call.text)
        assert written.error is None
        told = [f"original {number}", f"current {number}", f"graded {number}"]
        told += [f"last {number}"] if default == REFLECTION_PROMPT else []
        assert all(words in call.text for words in told)
        assert "$" not in call.text


@pytest.mark.parametrize("default", [REFLECTION_PROMPT, REFINE_PROMPT])
def test_the_history_comes_first_oldest_first_each_text_before_its_picture(default):
    first, second = pictures(2, seed=7)
    history = (PastImage(first, "", "too dark"), PastImage(second, "lighten it", "too light"))
    (case,) = [replace(case, history=history) for case in cases(1)]
    with OpenAIServer() as server:
        write(server, [case], default)
        (call,) = server.calls
    assert [kind for kind, _ in call.parts] == ["text", "text", "image", "text", "image", "text", "image"]
    assert call.images == [png_bytes(image) for image in (first, second, case.image)]
    _, one, _, two, _, now, _ = (part for _, part in call.parts)
    assert "attempt 1 of 2" in one
    assert "too dark" in one
    assert "attempt 2 of 2" in two
    assert "too light" in two
    assert "original 0" in now
    assert "too" not in now
    if default == REFLECTION_PROMPT:
        assert "reflection: none" in one
        assert "reflection: lighten it" in two


def test_a_lasting_fault_hits_its_own_case_only():
    asked = cases(3)
    victim = png_bytes(asked[1].image)
    meter = UsageTracker()
    with OpenAIServer([Fault("refusal", when=lambda call: call.image == victim)]) as server:
        texts = write(server, asked, meter=meter)
    assert texts[0].text
    assert texts[2].text
    assert texts[1].text is None
    assert texts[1].error == "the model refused: I cannot help with that. (2 attempts)"
    assert (meter.snapshot().calls, meter.snapshot().attempts, meter.snapshot().failures) == (3, 4, 1)


def test_chaos_changes_no_text():
    asked = cases(25)
    with OpenAIServer() as server:
        quiet = write(server, asked)
    with OpenAIServer(chaos=Chaos(0.3, seed=1, hang=5.0)) as server:
        assert write(server, asked, max_retries=12, timeout=1.0, concurrency=25) == quiet
        assert len(server.calls) > 28


def test_instructions_can_be_replaced(tmp_path):
    path = tmp_path / "mine.md"
    (case,) = [replace(case, history=(PastImage(case.image, "r", "e"),)) for case in cases(1)]
    for text, told in (
        ("Be brief.\n---\n$prompt / $unknown / $$", "Earlier attempt 1 of 1, painted after this reflection: r\n"),
        ("Be brief.\n--- \n$number: $reflection\n---\n$prompt / $unknown / $$\n", "1: r\n"),
    ):
        path.write_text(text)
        with OpenAIServer() as server:
            write(server, [case], prompt_file=str(path))
            assert server.calls[0].text.startswith(f"Be brief.\n{told}")
            assert server.calls[0].text.endswith("\noriginal 0 / $unknown / $")
    for text in ("no divider", "a\n---\nb\n---\nc\n---\nd"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"mine\.md: a line ---"):
            HttpTextGenerator(
                HttpTextGeneratorConfig(base_url="http://localhost", prompt_file=str(path)), REFINE_PROMPT
            )
    with pytest.raises(InputError, match="cannot read"):
        HttpTextGenerator(HttpTextGeneratorConfig(base_url="http://localhost", prompt_file="/none.md"), REFINE_PROMPT)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ('"Move it."', "Move it."),
        ("Move\n\n it. ", "Move it."),
        ('Say "no" or "yes"', 'Say "no" or "yes"'),
        ('" "', None),
    ],
)
def test_a_text_is_one_line_without_quotation_marks_around_it(said, kept):
    class Says(OpenAIServer):
        def respond(self, call, faults):
            reply = super().respond(call, faults)
            reply["choices"][0]["message"]["content"] = said
            return reply

    with Says() as server:
        (written,) = write(server, cases(1), max_retries=0)
    assert written.text == kept
    assert (written.error == "the answer is empty (1 attempt)") == (kept is None)


def test_it_follows_the_protocol_and_gives_up_when_closed():
    with OpenAIServer() as server:
        writer = make_text_generator(
            HttpTextGeneratorConfig(base_url=server.base_url, concurrency=5, model="m"), REFINE_PROMPT
        )
        assert isinstance(writer, TextGenerator)
        assert (writer.name, writer.concurrency, writer.batch_size) == ("http m", 5, 1)
        writer.close()
        assert [written.error for written in writer.write(cases(2))] == [CLOSED, CLOSED]
