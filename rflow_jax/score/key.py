"""What scores follow from: a verifier's settings, and what its files make of those that are left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rflow_jax.search.run_folder import decisive, public_section
from rflow_jax.verifiers.config import REWARD, VerifierConfig
from rflow_jax.weights.hub import resolve_vlm
from rflow_jax.weights.reward.steps import find_step


def scores_follow_from(config: VerifierConfig) -> dict[str, Any]:
    """The settings of a verifier, and of an ensemble's members, with the checkpoints that they mean now.

    Raises:
        InputError: a reward model's checkpoint is not there.
    """
    return _resolved(decisive(public_section(config)), config)


def _resolved(section: Mapping[str, Any], config: VerifierConfig) -> dict[str, Any]:
    options = dict(section.get("options", {}))
    model = config.model or options.get("model")
    if config.name == REWARD and options.get("step") is None and isinstance(model, str):
        options["step"], _ = find_step(resolve_vlm(model, reward=True))
    elif config.members:
        options["members"] = [_resolved(*pair) for pair in zip(options["members"], config.members, strict=True)]
    else:
        return dict(section)
    return {**section, "options": options}
