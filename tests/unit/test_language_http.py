"""Reflections and refined prompts from a real server."""

import numpy as np
import PIL.Image
import pytest

from rflow_jax.chat import png_bytes
from rflow_jax.errors import InputError
from rflow_jax.language.base import Case
from rflow_jax.language.http import REFINE_PROMPT, REFLECTION_PROMPT, HttpWriter, WriterConfig
from tests.kit.openai_server import Fault, OpenAIServer, sentence_of


def cases(count: int) -> list[Case]:
    rng = np.random.default_rng(1)
    return [
        Case(
            image=PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)),
            prompt=f"original {number}",
            current_prompt=f"current {number}",
            evaluation=f"graded {number}",
            last_reflection=f"last {number}",
        )
        for number in range(count)
    ]


def write(server, asked, default=REFLECTION_PROMPT, **more):
    writer = HttpWriter(WriterConfig(base_url=server.base_url, max_retries=1, **more), default)
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
        assert written.text == sentence_of(call.image, call.text)
        assert written.error is None
        told = [f"original {number}", f"current {number}", f"graded {number}"]
        told += [f"last {number}"] if default == REFLECTION_PROMPT else []
        assert all(words in call.text for words in told)


def test_a_lasting_fault_hits_its_own_case_only():
    asked = cases(3)
    victim = png_bytes(asked[1].image)
    with OpenAIServer([Fault("refusal", when=lambda call: call.image == victim)]) as server:
        texts = write(server, asked)
    assert texts[0].text
    assert texts[2].text
    assert texts[1].text is None
    assert "refused" in texts[1].error


def test_instructions_can_be_replaced(tmp_path):
    path = tmp_path / "mine.md"
    path.write_text("Be brief.\n---\n$prompt / $unknown")
    with OpenAIServer() as server:
        write(server, cases(1), prompt_file=str(path))
        assert server.calls[0].text == "Be brief.\noriginal 0 / $unknown"
    path.write_text("no divider")
    with pytest.raises(InputError, match=r"mine\.md: a line ---"):
        HttpWriter(WriterConfig(base_url="http://localhost", prompt_file=str(path)), REFINE_PROMPT)
    with pytest.raises(InputError, match="cannot read"):
        HttpWriter(WriterConfig(base_url="http://localhost", prompt_file="/none.md"), REFINE_PROMPT)
