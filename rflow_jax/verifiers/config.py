"""Which verifier scores the images."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.openai_client import Endpoint
from rflow_jax.openai_client.endpoint import OF_ANSWERS
from rflow_jax.utils.plugins import check_name, check_unused, parse_options

REWARD, ENSEMBLE, NONE = "reward", "ensemble", "none"
VERIFIERS = {
    "openai": "rflow_jax.verifiers.openai:OpenAIVerifier",
    "yesno": "rflow_jax.verifiers.yesno:YesNoVerifier",
    "nvila": "rflow_jax.verifiers.factory:nvila",
    REWARD: "rflow_jax.verifiers.factory:reward",
    "clip": "rflow_jax.verifiers.factory:clip",
    ENSEMBLE: "rflow_jax.verifiers.ensemble:EnsembleVerifier",
}
"""Names and their classes, which are made as ``Class(config, meter)`` and follow ``Verifier``."""

OVER_HTTP = ("openai", "yesno")
OF_HTTP = (*OF_ANSWERS, "prompts", "template")
INSTEAD = {
    "nvila": {"template": "give options.template, raw or question"},
    REWARD: {"template": "give options.prompt_file", "prompts": "give options.prompt_file"},
}
"""The options of a verifier in this process that replace a setting of those over HTTP."""


@dataclass(frozen=True)
class EnsembleOptions:
    """The options of an ensemble.

    Attributes:
        members: a ``verifier`` section each.
        weights: how much each member counts; empty: all alike.
    """

    members: list[dict[str, Any]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class VerifierConfig(Endpoint):
    """Which verifier scores the images.

    Attributes:
        name: openai (grades in JSON, from any compatible endpoint), yesno (the likelihood of yes and no as the first
            word); nvila, reward or clip in this process; ensemble of several; a class of your own as
            package.module:Class; or none to generate without scoring (noise only).
        prompts: folder with judge.md, question.md and aspects.json for openai, instead of the ones shipped here.
        template: what yesno asks: question, raw (the prompt alone), or a file with $prompt in it.
        options: of a verifier in this process, such as {batch_size: 8, rank: margin}; of an ensemble its members, a
            section like this one each, and their weights.
    """

    name: str = "openai"
    prompts: str | None = None
    template: str = "question"
    options: dict[str, Any] = field(default_factory=dict, repr=False)  # members may have addresses with passwords

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("verifier", self.name, (*VERIFIERS, NONE))
        if self.name in VERIFIERS and not self.asks_endpoint:
            other = "give it to the members" if self.name == ENSEMBLE else "leave it out"
            check_unused(self, dict.fromkeys(OF_HTTP, other) | INSTEAD.get(self.name, {}))
        if self.name != ENSEMBLE:
            return
        if not self.members:
            raise InputError(f"{ENSEMBLE}.options: give members, such as [{{name: nvila}}, {{name: clip}}]")
        if wrong := [member.name for member in self.members if member.name in (ENSEMBLE, NONE)]:
            raise InputError(f"{ENSEMBLE}.options: a member cannot be {wrong[0]}")
        if len(self.weights) != len(self.members) or not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise InputError(
                f"{ENSEMBLE}.options: weights is {list(self.weights)}: give a number above 0 for each of the "
                f"{len(self.members)} members"
            )

    @cached_property
    def members(self) -> tuple["VerifierConfig", ...]:
        """Those of an ensemble; empty for any other verifier."""
        if self.name != ENSEMBLE:
            return ()
        given = parse_options(EnsembleOptions, self.options, f"{ENSEMBLE}.options").members
        return tuple(parse_options(VerifierConfig, m, f"{ENSEMBLE}.options.members[{k}]") for k, m in enumerate(given))

    @property
    def weights(self) -> tuple[float, ...]:
        """One for each member."""
        weights = parse_options(EnsembleOptions, self.options, f"{ENSEMBLE}.options").weights
        return tuple(weights or [1.0] * len(self.members))

    @property
    def asks_endpoint(self) -> bool:
        """Whether it is called over HTTP."""
        return self.name in OVER_HTTP
