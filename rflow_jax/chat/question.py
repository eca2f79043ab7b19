"""What is asked, and what comes back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CLOSED = "closed while the answer was awaited"


class ChatError(Exception):
    """A question that got no usable answer within its retries; the message is the reason, in one line.

    The message is ``CLOSED`` where the chat was closed before: asking again later may well succeed.
    """


class UnusableAnswer(Exception):
    """An answer that arrived but cannot be used; asking again may help."""


@dataclass(frozen=True)
class Form:
    """The JSON object that an answer must be.

    Servers may ignore it, so the question also says it in words.

    Attributes:
        name: what the object is called.
        schema: its JSON schema, in the subset that strict servers take.
    """

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: its words; may be empty.
        cut: it ended at the limit of tokens.
        tokens: the likeliest first tokens with their log-probabilities, where they were asked for.
    """

    text: str
    cut: bool = False
    tokens: tuple[tuple[str, float], ...] = ()

    def words(self) -> str:
        """The text of a whole answer.

        Raises:
            UnusableAnswer: it is empty, or was cut.
        """
        if self.cut:
            raise UnusableAnswer("the answer was cut at the limit of tokens; raise max_tokens")
        if not self.text.strip():
            raise UnusableAnswer("the answer is empty")
        return self.text


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        messages: the chat so far.
        parse: turns the answer into a value, or raises ``UnusableAnswer``.
        form: the form that the answer must have.
        options: further fields of the request; they win over the endpoint's settings.
    """

    messages: Sequence[Mapping[str, Any]]
    parse: Callable[[Answer], Any]
    form: Form | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
