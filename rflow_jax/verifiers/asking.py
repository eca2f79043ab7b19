"""What verifiers over HTTP have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from rflow_jax.chat import Chat, ChatError, Question
from rflow_jax.usage import Meter
from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.config import VerifierConfig


class ChatVerifier:
    """Asks one question an image; a subclass says which, and parses the answer to a ``Verdict``.

    Args:
        kind: first word of the name.
        config: where to ask.
        meter: counts what is used.
    """

    batch_size = 1

    def __init__(self, kind: str, config: VerifierConfig, meter: Meter | None) -> None:
        self._chat = Chat(config, meter)
        self.name = f"{kind} {config.model_name}"
        self.concurrency = config.concurrency

    def question(self, image: Image, item: Mapping[str, Any]) -> Question:
        """What is asked about one image."""
        raise NotImplementedError

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order; an image without a usable answer is unscored with the reason."""
        answers = self._chat.ask_all([self.question(*pair) for pair in zip(images, items, strict=True)])
        return [
            Verdict(score=None, error=str(answer)) if isinstance(answer, ChatError) else answer for answer in answers
        ]

    def close(self) -> None:
        """Gives up what is waiting; those images are unscored, with ``CLOSED`` as the reason."""
        self._chat.close()
