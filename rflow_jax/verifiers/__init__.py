"""Verifiers score how well an image shows its prompt: one protocol, and its implementations by name."""

from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.utils.plugins import load_class, require_limits
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.config import NONE, VERIFIERS, VerifierConfig


def make_verifier(config: VerifierConfig, meter: UsageTracker | None = None) -> Verifier | None:
    """The verifier that a configuration names; None for "none".

    Raises:
        InputError: the name is unknown, something that the verifier needs is missing, or it is not a ``Verifier``.
    """
    if config.name == NONE:
        return None
    verifier = load_class("verifier", config.name, VERIFIERS)(config, meter)
    require_limits("verifier", config.name, verifier, "score")
    return verifier
