"""Verifiers score how well an image shows its prompt: one protocol, and its implementations by name."""

from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.utils.registry import probed
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.config import (
    VERIFIERS,
    EnsembleVerifierConfig,
    LocalVerifierConfig,
    NoVerifierConfig,
    VerifierConfig,
)


def make_verifier(config: VerifierConfig, meter: UsageTracker | None = None, *, probe: bool = False) -> Verifier | None:
    """The verifier that a configuration describes; None for ``NoVerifierConfig``.

    Args:
        probe: whether its service is asked a first question; those of an ensemble are before it loads any model.

    Raises:
        InputError: something that the verifier needs is missing, or it is not a ``Verifier``.
        ServiceError: its service did not take the first question.
    """
    if isinstance(config, NoVerifierConfig):
        return None
    made_from = VERIFIERS.load(config.name)
    if isinstance(config, LocalVerifierConfig):
        verifier = made_from(config)
    elif isinstance(config, EnsembleVerifierConfig):
        verifier = made_from(config, meter, probe=probe)
    else:
        verifier = made_from(config, meter)
    VERIFIERS.require_limits(config.name, verifier, "score")
    return probed(verifier) if probe else verifier
