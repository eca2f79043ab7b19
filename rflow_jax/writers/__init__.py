"""Writers of reflections and refined prompts: one protocol, and its implementations by name."""

from pathlib import Path

from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.utils.registry import probed
from rflow_jax.writers.base import WRITERS, TextGenerator, TextGeneratorConfig

_PROMPTS = Path(__file__).parent / "prompts"
REFLECTION_PROMPT = _PROMPTS / "reflection.md"
REFINE_PROMPT = _PROMPTS / "refine.md"


def make_text_generator(
    config: TextGeneratorConfig, default_prompt: Path, meter: UsageTracker | None = None, *, probe: bool = False
) -> TextGenerator:
    """The writer that a configuration describes.

    Args:
        default_prompt: its role: ``REFLECTION_PROMPT`` or ``REFINE_PROMPT``.
        probe: whether its service is asked a first question.

    Raises:
        InputError: something that the writer needs is missing, or it is not a ``TextGenerator``.
        ServiceError: its service did not take the first question.
    """
    writer = WRITERS.load(config.name)(config, default_prompt, meter)
    WRITERS.require_limits(config.name, writer, "write")
    return probed(writer) if probe else writer
