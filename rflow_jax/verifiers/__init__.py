"""Verifiers score how well an image shows its prompt: one protocol, and its implementations by name."""

from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.config import VERIFIERS, LocalVerifierConfig, NoVerifierConfig, VerifierConfig


def make_verifier(config: VerifierConfig, meter: UsageTracker | None = None) -> Verifier | None:
    """The verifier that a configuration describes; None for ``NoVerifierConfig``.

    Raises:
        InputError: something that the verifier needs is missing, or it is not a ``Verifier``.
    """
    if isinstance(config, NoVerifierConfig):
        return None
    made_from = VERIFIERS.load(config.name)
    verifier = made_from(config) if isinstance(config, LocalVerifierConfig) else made_from(config, meter)
    VERIFIERS.require_limits(config.name, verifier, "score")
    return verifier
