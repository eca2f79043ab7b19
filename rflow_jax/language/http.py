"""Reflection generator and prompt refiner behind an OpenAI-compatible endpoint."""

from collections.abc import Sequence
from pathlib import Path

from rflow_jax.chat import Answer, Chat, ChatError, Question, UnusableAnswer, look_and_say
from rflow_jax.language.base import Case, Written
from rflow_jax.language.config import WriterConfig
from rflow_jax.language.prompt_file import PromptFile, in_one_line
from rflow_jax.usage import Meter


class HttpWriter:
    """Asks a model for one text a case; serves both roles, which differ in their prompt file.

    Raises:
        InputError: no key for OpenAI's own address, or the prompt file is not usable.
    """

    batch_size = 1

    def __init__(self, config: WriterConfig, default_prompt: Path, meter: Meter | None = None) -> None:
        self._parts = PromptFile.of(config.prompt_file, default_prompt)
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
        *earlier, (text, image) = self._parts.told(case)
        return Question(look_and_say(self._parts.instructions, text, image, earlier), _clean)


def _clean(answer: Answer) -> str:
    """The text of an answer that can be used."""
    text = in_one_line(answer.words())
    if not text:
        raise UnusableAnswer("the answer is empty")
    return text
