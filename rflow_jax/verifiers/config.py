"""Which verifier scores the images."""

from dataclasses import dataclass

from rflow_jax.chat import Endpoint
from rflow_jax.registry import check_name

VERIFIERS = {
    "openai": "rflow_jax.verifiers.openai:OpenAIVerifier",
    "yesno": "rflow_jax.verifiers.yesno:YesNoVerifier",
}
"""Names and their classes, which are made as ``Class(config, meter)`` and follow ``Verifier``."""

NONE = "none"


@dataclass(frozen=True)
class VerifierConfig(Endpoint):
    """Which verifier scores the images.

    Attributes:
        name: openai (grades in JSON, from any compatible endpoint), yesno (the likelihood of yes and no as the first
            word), a class of your own as package.module:Class, or none to generate without scoring (noise only).
        prompts: folder with judge.md, question.md and aspects.json for openai, instead of the ones shipped here.
        template: what yesno asks: question, raw (the prompt alone), or a file with $prompt in it.
    """

    name: str = "openai"
    prompts: str | None = None
    template: str = "question"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("verifier", self.name, (*VERIFIERS, NONE))
