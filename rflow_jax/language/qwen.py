"""Reflection generator and prompt refiner in this process: Qwen2.5-VL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from rflow_jax.errors import InputError
from rflow_jax.language.base import Case, Written
from rflow_jax.vlm.qwen_chat import Question, QwenChat


class QwenWriter:
    """Writes one text a case; serves both roles, which differ in their prompt file and may share one model.

    Args:
        chat: the model.
        prompt_file: instructions, a line ``---``, then the question (a part between them, for earlier pictures, is not
            used), as the prompt files shipped with :mod:`rflow_jax.language`.

    Raises:
        InputError: the prompt file is not usable.
    """

    concurrency = 1

    def __init__(self, chat: QwenChat, prompt_file: Path):
        self._chat = chat
        self._instructions, self._question = _read(prompt_file)
        self.name = f"qwen {Path(chat.config.model).name}"
        self.batch_size = chat.config.batch_size

    def write(self, cases: Sequence[Case]) -> list[Written]:
        """One text a case, in order; a case without a usable answer carries the reason."""
        answers = self._chat.answer([self._ask_about(case) for case in cases])
        return [_written(answer) for answer in answers]

    def close(self) -> None:
        """Nothing waits."""

    def _ask_about(self, case: Case) -> Question:
        text = self._question.safe_substitute(
            prompt=case.prompt,
            current_prompt=case.current_prompt,
            evaluation=case.evaluation,
            last_reflection=case.last_reflection or "none",
            new_reflection=case.reflection or "none",
        )
        return Question(self._instructions, (text, case.image))


def _written(answer: str | InputError) -> Written:
    """The text in one line, without the quotation marks that models like to put around it."""
    if isinstance(answer, InputError):
        return Written(None, str(answer))
    text = " ".join(answer.split())
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    return Written(text) if text else Written(None, "the answer is empty")


def _read(path: Path) -> tuple[str, Template]:
    try:
        parts = re.split(r"^---\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except OSError as error:
        raise InputError(f"{path}: cannot read this prompt file ({error.strerror})") from error
    if len(parts) < 2:
        raise InputError(f"{path}: a line --- must divide the instructions from the question")
    return parts[0].strip(), Template(parts[-1].strip())
