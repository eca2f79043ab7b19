"""Reflection generator and prompt refiner in this process: Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rflow_jax.errors import InputError
from rflow_jax.language.base import Case, Written
from rflow_jax.language.prompt_file import PromptFile, in_one_line
from rflow_jax.vlm.qwen_chat import Question, QwenChat


class QwenWriter:
    """Writes one text a case; serves both roles, which differ in their prompt file and may share one model.

    Args:
        chat: the model.
        prompt_file: as :mod:`rflow_jax.language.prompt_file` says; its part about earlier pictures is not used.

    Raises:
        InputError: the prompt file is not usable.
    """

    concurrency = 1

    def __init__(self, chat: QwenChat, prompt_file: Path):
        self._chat = chat
        self._parts = PromptFile.read(prompt_file)
        self.name = f"qwen {Path(chat.config.model).name}"
        self.batch_size = chat.config.batch_size

    def write(self, cases: Sequence[Case]) -> list[Written]:
        """One text a case, in order; a case without a usable answer carries the reason."""
        answers = self._chat.answer([self._ask_about(case) for case in cases])
        return [_written(answer) for answer in answers]

    def close(self) -> None:
        """Nothing waits."""

    def _ask_about(self, case: Case) -> Question:
        text = self._parts.question.safe_substitute(
            prompt=case.prompt,
            current_prompt=case.current_prompt,
            evaluation=case.evaluation,
            last_reflection=case.last_reflection or "none",
            new_reflection=case.reflection or "none",
        )
        return Question(self._parts.instructions, (text, case.image))


def _written(answer: str | InputError) -> Written:
    """A text, or the reason why there is none."""
    if isinstance(answer, InputError):
        return Written(None, str(answer))
    text = in_one_line(answer)
    return Written(text) if text else Written(None, "the answer is empty")
