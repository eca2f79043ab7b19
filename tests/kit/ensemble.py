"""Members of ensembles for tests: they score by the image's bytes, and their configuration says how they are."""

import json
from collections.abc import Mapping
from typing import Any

from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.testing.openai_server import score_of
from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.config import VERIFIERS, PluginVerifierConfig, VerifierConfig
from tests.kit.searching import HashVerifier

OWN = {"name": "tests.kit.ensemble:make"}
MADE: dict[str, HashVerifier] = {}
"""Those that were made last, by their names."""


class Backwards(HashVerifier):
    """Scores the other way round."""

    def _verdict(self, png: bytes, item: Mapping[str, Any]) -> Verdict:
        verdict = super()._verdict(png, item)
        return Verdict(None if verdict.score is None else -verdict.score, error=verdict.error)


def make(config: PluginVerifierConfig, meter: UsageTracker | None) -> HashVerifier:
    """A verifier whose ``model`` says how it is: {"name", "concurrency", "batch_size", "fails", "backwards"}."""
    how = json.loads(config.model or "{}")
    kind = Backwards if how.pop("backwards", False) else HashVerifier
    bad = how.pop("fails", "")
    made = kind(meter, fails=lambda png: bool(bad) and str(score_of(png))[-1] in bad, **how)
    MADE[made.name] = made
    return made


def own(name: str, **how: Any) -> dict[str, Any]:
    """The section of a member."""
    return OWN | {"model": json.dumps({"name": name, "concurrency": 1, **how})}


def config(*members: dict[str, Any], **more: Any) -> VerifierConfig:
    """An ensemble."""
    return VERIFIERS.parse({"name": "ensemble", "members": list(members)} | more)
