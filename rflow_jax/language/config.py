"""Which model writes."""

from dataclasses import dataclass, field
from typing import Any

from rflow_jax.chat import Endpoint
from rflow_jax.chat.endpoint import OF_ANSWERS
from rflow_jax.options import refuse_set
from rflow_jax.registry import check_name

HTTP = "http"
WRITERS = {HTTP: "rflow_jax.language.http:HttpWriter", "qwen": "rflow_jax.local_models:qwen"}
"""Names and their classes, which are made as ``Class(config, default_prompt, meter)`` and follow ``Writer``."""

INSTEAD = {"temperature": "give options.temperature", "max_tokens": "give options.max_new_tokens"}
"""What a writer in this process takes in place of a setting of those over HTTP."""


@dataclass(frozen=True)
class WriterConfig(Endpoint):
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
            refuse_set(self, dict.fromkeys(OF_ANSWERS, "leave it out") | INSTEAD)

    @property
    def asks_endpoint(self) -> bool:
        """Whether it is asked over HTTP."""
        return self.name == HTTP
