"""Pictures and questions for tests of the HTTP backend."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from rflow_jax.openai_client import Answer, Chat, ChatRequest, Endpoint, vision_messages
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.testing.openai_server import sentence_of
from rflow_jax.utils.images import png_bytes

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "default")


def pictures(count: int, seed: int = 0) -> list[PIL.Image.Image]:
    """Small pictures, each with bytes of its own."""
    rng = np.random.default_rng(seed)
    return [PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def items(count: int) -> list[dict[str, Any]]:
    """Metadata of prompts of every kind."""
    return [{"prompt": f"a photo of {number} kites", "tag": TAGS[number % len(TAGS)]} for number in range(count)]


def question(number: int = 0, parse: Callable[[Answer], Any] = Answer.require_text, **more: Any) -> ChatRequest:
    """A question for a free text."""
    return ChatRequest(vision_messages("Be brief.", f"question {number}", pictures(1, number)[0]), parse, **more)


def expected(numbers: Iterable[int]) -> list[str]:
    """What the local server answers to the questions with these numbers."""
    return [sentence_of(png_bytes(pictures(1, n)[0]), f"Be brief.\nquestion {n}") for n in numbers]


def ask(server: Any, questions: list[ChatRequest], meter: UsageTracker | None = None, **more: Any) -> list[Any]:
    """The answers of a chat of its own."""
    chat = Chat(Endpoint(**({"base_url": server.base_url, "max_retries": 3, "timeout": 10.0} | more)), meter)
    try:
        return chat.ask_all(questions)
    finally:
        chat.close()


def prompt_folder(
    folder: Path,
    judge: str = "Be strict.\n$aspects\n$form",
    aspects: str = '{"default": {"sharpness": "Nothing is blurred."}}',
) -> str:
    """A folder with prompts of a user's own for a grader."""
    (folder / "judge.md").write_text(judge)
    (folder / "question.md").write_text("Q: $prompt $$5")
    (folder / "aspects.json").write_text(aspects)
    return str(folder)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Returns as soon as the condition holds; fails if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.005)
