"""Reflection generator and prompt refiner behind an OpenAI-compatible endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from rflow_jax.chat import Chat, ChatError, Endpoint, Question, UnusableAnswer, look_and_say
from rflow_jax.errors import InputError
from rflow_jax.language.base import Case, Written

_PROMPTS = Path(__file__).parent / "prompts"
REFLECTION_PROMPT = _PROMPTS / "reflection.md"
REFINE_PROMPT = _PROMPTS / "refine.md"
_DIVIDER = "\n---\n"


@dataclass(frozen=True)
class WriterConfig(Endpoint):
    """Which model writes.

    Attributes:
        prompt_file: instructions, a line ``---``, then the question, instead of the ones shipped here.
    """

    prompt_file: str | None = None


class HttpWriter:
    """Asks a model for one text a case; serves both roles, which differ in their prompt file.

    Raises:
        InputError: no key for OpenAI's own address, or the prompt file is not usable.
    """

    def __init__(self, config: WriterConfig, default_prompt: Path) -> None:
        path = Path(config.prompt_file) if config.prompt_file else default_prompt
        self._instructions, self._question = _read(path)
        self._chat = Chat(config)

    def write(self, cases: Sequence[Case]) -> list[Written]:
        """One text a case, in order; a case without a usable answer carries the reason."""
        answers = self._chat.ask_all([self._ask_about(case) for case in cases])
        return [Written(None, str(answer)) if isinstance(answer, ChatError) else Written(answer) for answer in answers]

    def close(self) -> None:
        """Gives up what is waiting."""
        self._chat.close()

    def _ask_about(self, case: Case) -> Question:
        text = self._question.safe_substitute(
            prompt=case.prompt,
            current_prompt=case.current_prompt,
            evaluation=case.evaluation,
            last_reflection=case.last_reflection or "none",
        )
        return Question(look_and_say(self._instructions, text, case.image), _clean)


def _clean(answer: str) -> str:
    """The text in one line, without the quotation marks that models like to put around it."""
    text = " ".join(answer.split())
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    if not text:
        raise UnusableAnswer("the answer is empty")
    return text


def _read(path: Path) -> tuple[str, Template]:
    try:
        instructions, divider, asked = path.read_text(encoding="utf-8").partition(_DIVIDER)
    except OSError as error:
        raise InputError(f"{path}: cannot read this prompt file ({error.strerror})") from error
    if not divider:
        raise InputError(f"{path}: a line --- must divide the instructions from the question")
    return instructions.strip(), Template(asked.strip())
