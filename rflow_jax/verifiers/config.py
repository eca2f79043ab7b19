"""Which verifier scores the images."""

from dataclasses import dataclass, field
from typing import Any

from rflow_jax.chat import Endpoint
from rflow_jax.registry import check_name

VERIFIERS = {
    "openai": "rflow_jax.verifiers.openai:OpenAIVerifier",
    "yesno": "rflow_jax.verifiers.yesno:YesNoVerifier",
    "nvila": "rflow_jax.local_models:nvila",
    "reward": "rflow_jax.local_models:reward",
    "clip": "rflow_jax.local_models:clip",
}
"""Names and their classes, which are made as ``Class(config, meter)`` and follow ``Verifier``."""

OVER_HTTP = ("openai", "yesno")
NONE = "none"


@dataclass(frozen=True)
class VerifierConfig(Endpoint):
    """Which verifier scores the images.

    Attributes:
        name: openai (grades in JSON, from any compatible endpoint), yesno (the likelihood of yes and no as the first
            word); nvila, reward or clip in this process; a class of your own as package.module:Class; or none to
            generate without scoring (noise only).
        prompts: folder with judge.md, question.md and aspects.json for openai, instead of the ones shipped here.
        template: what yesno asks: question, raw (the prompt alone), or a file with $prompt in it.
        options: of a verifier in this process, such as {batch_size: 8, rank: margin}.
    """

    name: str = "openai"
    prompts: str | None = None
    template: str = "question"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("verifier", self.name, (*VERIFIERS, NONE))

    @property
    def asks_endpoint(self) -> bool:
        """Whether it is asked over HTTP."""
        return self.name in OVER_HTTP
