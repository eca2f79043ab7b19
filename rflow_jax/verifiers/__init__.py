"""How well an image shows its prompt: one protocol, and those who follow it by name."""

from rflow_jax.registry import find, require_limits
from rflow_jax.usage import Meter
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.config import NONE, VERIFIERS, VerifierConfig


def make_verifier(config: VerifierConfig, meter: Meter | None = None) -> Verifier | None:
    """The verifier that a configuration names; None for "none".

    Raises:
        InputError: the name is unknown, or what the verifier needs is missing, or it is no ``Verifier``.
    """
    if config.name == NONE:
        return None
    verifier = find("verifier", config.name, VERIFIERS)(config, meter)
    require_limits("verifier", config.name, verifier, "score")
    return verifier
