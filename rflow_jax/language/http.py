"""Reflection generator and prompt refiner behind an OpenAI-compatible endpoint.

A prompt file has two or three parts, divided by lines ``---``:

- the instructions;
- what is said about an earlier picture of the chain, once for each, followed by that picture: ``$number``, ``$count``,
  ``$reflection``, ``$evaluation``. Without this part the shipped one is taken;
- the question, followed by the picture in hand: ``$prompt`` (the original), ``$current_prompt``, ``$evaluation``,
  ``$last_reflection``, and for the refiner ``$new_reflection``.

``$$`` is a dollar sign.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from PIL.Image import Image

from rflow_jax.chat import Answer, Chat, ChatError, Question, UnusableAnswer, look_and_say
from rflow_jax.chat.prompt_file import read_prompt
from rflow_jax.errors import InputError
from rflow_jax.language import REFINE_PROMPT, REFLECTION_PROMPT
from rflow_jax.language.base import Case, Written
from rflow_jax.language.config import WriterConfig
from rflow_jax.usage import Meter

__all__ = ["REFINE_PROMPT", "REFLECTION_PROMPT", "HttpWriter", "WriterConfig"]


class HttpWriter:
    """Asks a model for one text a case; serves both roles, which differ in their prompt file.

    Raises:
        InputError: no key for OpenAI's own address, or the prompt file is not usable.
    """

    batch_size = 1

    def __init__(self, config: WriterConfig, default_prompt: Path, meter: Meter | None = None) -> None:
        shipped = _Parts.read(default_prompt)
        self._parts = _Parts.read(Path(config.prompt_file), shipped) if config.prompt_file else shipped
        self._chat = Chat(config, meter)
        self.name = f"http {config.model_name}"
        self.concurrency = config.concurrency

    def write(self, cases: Sequence[Case]) -> list[Written]:
        """One text a case, in order; a case without a usable answer carries the reason."""
        answers = self._chat.ask_all([self._ask_about(case) for case in cases])
        return [Written(None, str(answer)) if isinstance(answer, ChatError) else Written(answer) for answer in answers]

    def close(self) -> None:
        """Gives up what is waiting; those cases have no text, with ``CLOSED`` as the reason."""
        self._chat.close()

    def _ask_about(self, case: Case) -> Question:
        text = self._parts.question.safe_substitute(
            prompt=case.prompt,
            current_prompt=case.current_prompt,
            evaluation=case.evaluation,
            last_reflection=case.last_reflection or "none",
            new_reflection=case.reflection or "none",
        )
        return Question(look_and_say(self._parts.instructions, text, case.image, self._history(case)), _clean)

    def _history(self, case: Case) -> list[tuple[str, Image]]:
        told = [
            self._parts.past.safe_substitute(
                number=number,
                count=len(case.history),
                reflection=past.reflection or "none",
                evaluation=past.evaluation,
            )
            for number, past in enumerate(case.history, 1)
        ]
        return [(text, past.image) for text, past in zip(told, case.history, strict=True)]


@dataclass(frozen=True)
class _Parts:
    """What a prompt file holds."""

    instructions: str
    past: Template
    question: Template

    @classmethod
    def read(cls, path: Path, shipped: "_Parts | None" = None) -> "_Parts":
        parts = [part.strip() for part in re.split(r"^---\s*$", read_prompt(path), flags=re.MULTILINE)]
        if len(parts) not in (2, 3):
            raise InputError(
                f"{path}: a line --- must divide the instructions from the question; "
                f"a part about earlier pictures may stand between them"
            )
        past = Template(parts[1]) if len(parts) == 3 or shipped is None else shipped.past
        return cls(parts[0], past, Template(parts[-1]))


def _clean(answer: Answer) -> str:
    """The text in one line, without the quotation marks that models like to put around it."""
    text = " ".join(answer.words().split())
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    if not text:
        raise UnusableAnswer("the answer is empty")
    return text
