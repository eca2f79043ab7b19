"""What to change in an image, and a better prompt: one protocol, and those who follow it by name."""

from pathlib import Path

from rflow_jax.language.base import Writer
from rflow_jax.language.config import WRITERS, WriterConfig
from rflow_jax.registry import find, require_limits
from rflow_jax.usage import Meter

_PROMPTS = Path(__file__).parent / "prompts"
REFLECTION_PROMPT = _PROMPTS / "reflection.md"
REFINE_PROMPT = _PROMPTS / "refine.md"


def make_writer(config: WriterConfig, default_prompt: Path, meter: Meter | None = None) -> Writer:
    """The writer that a configuration names.

    Args:
        config: which one.
        default_prompt: its role: ``REFLECTION_PROMPT`` or ``REFINE_PROMPT``.
        meter: counts what is used.

    Raises:
        InputError: the name is unknown, or what the writer needs is missing, or it is no ``Writer``.
    """
    writer = find("writer", config.name, WRITERS)(config, default_prompt, meter)
    require_limits("writer", config.name, writer, "write")
    return writer
