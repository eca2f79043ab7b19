"""Which model writes."""

from dataclasses import dataclass

from rflow_jax.chat import Endpoint
from rflow_jax.registry import check_name

WRITERS = {"http": "rflow_jax.language.http:HttpWriter"}
"""Names and their classes, which are made as ``Class(config, default_prompt, meter)`` and follow ``Writer``."""


@dataclass(frozen=True)
class WriterConfig(Endpoint):
    """Which model writes.

    Attributes:
        name: http (any OpenAI-compatible endpoint), or a class of your own as package.module:Class.
        prompt_file: what the model is told, instead of the file shipped here.
    """

    name: str = "http"
    prompt_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("writer", self.name, WRITERS)
