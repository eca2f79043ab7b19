"""Reflection generator and prompt refiner behind an OpenAI-compatible endpoint."""

from collections.abc import Sequence
from pathlib import Path

from rflow_jax.openai_client import Answer, Chat, ChatError, ChatRequest, UnusableAnswer, vision_messages
from rflow_jax.openai_client.messages import PROBE_PROMPT, probe_picture
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.writers.base import HttpTextGeneratorConfig, MissingOutput, WriterInput, WriterOutput
from rflow_jax.writers.prompt_template import PromptFile, in_one_line


class HttpTextGenerator:
    """Asks a model for one text a case; serves both roles, which differ in their prompt file.

    Attributes:
        service: model and address, for messages; records do not have it, since it may change.

    Raises:
        InputError: no key for OpenAI's own address, or the prompt file is not usable.
    """

    batch_size = 1

    def __init__(
        self, config: HttpTextGeneratorConfig, default_prompt: Path, meter: UsageTracker | None = None
    ) -> None:
        self._parts = PromptFile.of(config.prompt_file, default_prompt)
        first = self._request(WriterInput(probe_picture(), PROBE_PROMPT, PROBE_PROMPT, "Overall: 10"))
        self._chat = Chat(config.endpoint(), meter, first)
        self.name, self.service = f"http {config.model_name}", self._chat.name
        self.concurrency = config.concurrency

    def write(self, cases: Sequence[WriterInput]) -> list[WriterOutput]:
        """One text a case, in order; a case without a usable answer carries the reason."""
        return [_output(answer) for answer in self._chat.ask_all([self._request(case) for case in cases])]

    def probe(self) -> None:
        """Asks about a small picture; raises ServiceError if there is no such server, or no usable answer."""
        self._chat.probe()

    def close(self) -> None:
        """Cancels pending calls; those cases have no text, with ``CLOSED`` as the reason."""
        self._chat.close()

    def _request(self, case: WriterInput) -> ChatRequest:
        *earlier, last = self._parts.messages(case)
        return ChatRequest(vision_messages(self._parts.instructions, *last, earlier), _clean)


def _output(answer: str | ChatError) -> WriterOutput:
    if isinstance(answer, ChatError):
        return (MissingOutput if answer.missing else WriterOutput)(None, str(answer))
    return WriterOutput(answer)


def _clean(answer: Answer) -> str:
    """The text of an answer that can be used."""
    text = in_one_line(answer.require_text())
    if not text:
        raise UnusableAnswer("the answer is empty")
    return text
