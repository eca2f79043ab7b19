"""The protocol of a search's language models, which write reflections and refine prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from PIL.Image import Image

from rflow_jax.openai_client.endpoint import Connection, Endpoint
from rflow_jax.utils.ranges import SmallCount, Temperature, Tokens, require_ranges
from rflow_jax.utils.registry import Component, PluginOptions, Registry
from rflow_jax.utils.secrets import require_no_secret
from rflow_jax.vlm.config import QwenChatConfig


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
    """A text, or None with the reason why there is none.

    Attributes:
        missing: whether a service failed, so that it is not known what it would have written (:class:`MissingOutput`).
    """

    missing: ClassVar[bool] = False

    text: str | None
    error: str | None = None


@dataclass(frozen=True)
class MissingOutput(WriterOutput):
    """No text, for want of a service: it is recorded nowhere, and asked for again."""

    missing: ClassVar[bool] = True


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
        """One text a case, in the order of the cases; never raises for a single case.

        Where a service gave no answer it is a :class:`MissingOutput`: the next run asks again.
        """
        ...

    def close(self) -> None:
        """Cancels pending calls of all threads; their cases come back without a text, with the reason."""
        ...


@dataclass(frozen=True)
class TextGeneratorConfig(Component):
    """The settings of any writer; ``name`` says which."""


@dataclass(frozen=True)
class HttpTextGeneratorConfig(Connection, TextGeneratorConfig):
    """Any OpenAI-compatible endpoint.

    Attributes:
        temperature: sampling temperature; null leaves it to the server.
        max_tokens: longest answer in tokens; null leaves it to the server.
        prompt_file: a prompt file in place of the usual one, or the name of one in the package: reflection_generator.
    """

    name: Literal["http"] = field(default="http", init=False)
    temperature: Temperature | None = None
    max_tokens: Tokens | None = None
    prompt_file: str | None = None
    asks_endpoint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.endpoint()  # checks the others


@dataclass(frozen=True)
class QwenTextGeneratorConfig(QwenChatConfig, TextGeneratorConfig):
    """Qwen2.5-VL in this process; roles that differ in their prompt file alone share one model.

    Attributes:
        prompt_file: a prompt file in place of the usual one, or the name of one in the package: reflection_generator.
    """

    name: Literal["qwen"] = field(default="qwen", init=False)
    prompt_file: str | None = None

    @property
    def chat(self) -> QwenChatConfig:
        """The settings of the model alone."""
        return QwenChatConfig(**{one.name: getattr(self, one.name) for one in fields(QwenChatConfig)})


@dataclass(frozen=True)
class RulesTextGeneratorConfig(TextGeneratorConfig):
    """The findings of the verifier ``checklist`` in words, without a model; as a refiner it leaves prompts as they are.

    Attributes:
        sentences: of a reflection, at most.
    """

    name: Literal["rules"] = field(default="rules", init=False)
    sentences: SmallCount = 2

    def __post_init__(self) -> None:
        require_ranges(self)


@dataclass(frozen=True)
class PluginTextGeneratorConfig(Endpoint, PluginOptions, TextGeneratorConfig):
    """A class of your own, which is made as ``Class(config, default_prompt, meter)`` and follows ``TextGenerator``.

    Attributes:
        name: package.module:Class.
        prompt_file: a prompt file in place of the usual one, or the name of one in the package: reflection_generator.
        options: what the class makes of it; ``devices: [1]`` keeps the generator off these devices.
    """

    name: str = field(kw_only=True)
    prompt_file: str | None = None
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_secret(self.options, "options")


WRITERS = Registry(
    "writer",
    TextGeneratorConfig,
    "http",
    {
        "http": (HttpTextGeneratorConfig, "rflow_jax.writers.http:HttpTextGenerator"),
        "rules": (RulesTextGeneratorConfig, "rflow_jax.writers.rules:RulesTextGenerator"),
        "qwen": (QwenTextGeneratorConfig, "rflow_jax.writers.qwen:make_qwen_writer"),
    },
    PluginTextGeneratorConfig,
    Endpoint,
)
