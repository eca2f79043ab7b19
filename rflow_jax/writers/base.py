"""The protocol of a search's language models, which write reflections and refine prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image

from rflow_jax.openai_client import Endpoint
from rflow_jax.openai_client.endpoint import OF_ANSWERS
from rflow_jax.utils.plugins import check_name, check_unused


@dataclass(frozen=True)
class PastImage:
    """An earlier image of a chain.

    Attributes:
        reflection: the one that it was made with; empty for a first image.
        evaluation: the verifier's findings about it in words.
    """

    image: Image
    reflection: str
    evaluation: str


@dataclass(frozen=True)
class WriterInput:
    """One image to write about.

    Attributes:
        prompt: the original prompt.
        current_prompt: the prompt that the image was made with (the original or its last refinement).
        evaluation: the verifier's findings in words.
        last_reflection: the reflection that the image was made with; empty for a first image.
        reflection: for the refiner: the new reflection on the image, if there is one.
        history: images of its chain before it, oldest first.
    """

    image: Image
    prompt: str
    current_prompt: str
    evaluation: str
    last_reflection: str = ""
    reflection: str = ""
    history: tuple[PastImage, ...] = ()


@dataclass(frozen=True)
class WriterOutput:
    """A text, or None with the reason why there is none."""

    text: str | None
    error: str | None = None


@runtime_checkable
class TextGenerator(Protocol):
    """Writes one text a case: a reflection generator, or a prompt refiner."""

    name: str
    """A short description for the record, such as "http gpt-4o"; never an address or a key."""

    concurrency: int
    """Calls of ``write`` that may run at once (1 for a model in this process)."""

    batch_size: int
    """Cases that a call takes at once (1 over HTTP)."""

    def write(self, cases: Sequence[WriterInput]) -> list[WriterOutput]:
        """One text a case, in the order of the cases; never raises for a single case."""
        ...

    def close(self) -> None:
        """Cancels pending calls of all threads; their cases come back without a text, with the reason."""
        ...


HTTP = "http"
WRITERS = {HTTP: "rflow_jax.writers.http:HttpTextGenerator", "qwen": "rflow_jax.verifiers.factory:qwen"}
"""Names and their classes, which are made as ``Class(config, default_prompt, meter)`` and follow ``TextGenerator``."""

INSTEAD = {"temperature": "give options.temperature", "max_tokens": "give options.max_new_tokens"}
"""The options of a writer in this process that replace a setting of those over HTTP."""


@dataclass(frozen=True)
class TextGeneratorConfig(Endpoint):
    """Which model writes.

    Attributes:
        name: http (any OpenAI-compatible endpoint), qwen in this process, or a class of your own as
            package.module:Class.
        prompt_file: what the model is told, instead of the file shipped here.
        options: of a writer in this process, such as {batch_size: 8, max_new_tokens: 128}.
    """

    name: str = HTTP
    prompt_file: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("writer", self.name, WRITERS)
        if self.name in WRITERS and not self.asks_endpoint:
            check_unused(self, dict.fromkeys(OF_ANSWERS, "leave it out") | INSTEAD)

    @property
    def asks_endpoint(self) -> bool:
        """Whether it is called over HTTP."""
        return self.name == HTTP
