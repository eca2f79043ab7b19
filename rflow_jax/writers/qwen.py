"""Reflection generator and prompt refiner in this process: Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from rflow_jax.errors import InputError
from rflow_jax.openai_client.answer_text import only_answer
from rflow_jax.openai_client.messages import UnusableAnswer
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat
from rflow_jax.weights.hub import short_name
from rflow_jax.writers.base import QwenTextGeneratorConfig, WriterInput, WriterOutput
from rflow_jax.writers.prompt_template import PromptFile, in_one_line


def make_qwen_writer(
    config: QwenTextGeneratorConfig, default_prompt: Path, meter: UsageTracker | None = None
) -> QwenTextGenerator:
    """The writer that a configuration describes; both roles share a model that is configured alike."""
    return QwenTextGenerator(_shared(config.chat), default_prompt, config.prompt_file)


@lru_cache(maxsize=1)
def _shared(config: QwenChatConfig) -> QwenChat:
    return QwenChat(config)


class QwenTextGenerator:
    """Writes one text a case; serves both roles, which differ in their prompt file and may share one model.

    Args:
        chat: the model.
        default_prompt: its role: ``REFLECTION_PROMPT`` or ``REFINE_PROMPT``.
        prompt_file: the instructions instead, as described in :mod:`rflow_jax.writers.prompt_template`.

    Raises:
        InputError: the prompt file is not usable.
    """

    concurrency = 1

    def __init__(self, chat: QwenChat, default_prompt: Path, prompt_file: str | Path | None = None):
        self._chat = chat
        self._parts = PromptFile.of(prompt_file, default_prompt)
        self.name = f"qwen {short_name(chat.config.model)}"
        self.batch_size = chat.config.batch_size

    def write(self, cases: Sequence[WriterInput]) -> list[WriterOutput]:
        """One text a case, in order; a case without a usable answer carries the reason."""
        queries = []
        for case in cases:
            parts = [part for pair in self._parts.messages(case) for part in pair]
            queries.append(ChatQuery(self._parts.instructions, tuple(parts)))
        return [_written(answer) for answer in self._chat.answer(queries)]

    def close(self) -> None:
        """Does nothing: no calls are pending."""


def _written(answer: str | InputError) -> WriterOutput:
    """A text, or the reason why there is none."""
    if isinstance(answer, InputError):
        return WriterOutput(None, str(answer))
    try:
        text = in_one_line(only_answer(answer))
    except UnusableAnswer as error:
        return WriterOutput(None, str(error))
    return WriterOutput(text) if text else WriterOutput(None, "the answer is empty")
