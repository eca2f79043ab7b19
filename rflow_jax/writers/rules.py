"""A writer that puts a checklist's findings into words, right or wrong as they are, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.verifiers.findings import as_reflection, remedies_in
from rflow_jax.writers import REFINE_PROMPT
from rflow_jax.writers.base import RulesTextGeneratorConfig, WriterInput, WriterOutput


class RulesTextGenerator:
    """Writes reflections, the remedies of the first parts that were not met; as a refiner it leaves prompts alone."""

    name, concurrency, batch_size = "rules", 1, 64

    def __init__(self, config: RulesTextGeneratorConfig, default_prompt: Path, meter: UsageTracker | None = None):
        self._most, self._refines = config.sentences, default_prompt == REFINE_PROMPT

    def write(self, cases: Sequence[WriterInput]) -> list[WriterOutput]:
        """One text a case, in order."""
        if self._refines:
            return [WriterOutput(case.current_prompt) for case in cases]
        return [self._written(remedies_in(case.evaluation)) for case in cases]

    def close(self) -> None:
        """Does nothing: no calls are pending."""

    def _written(self, remedies: list[str] | None) -> WriterOutput:
        if remedies is None:
            return WriterOutput(None, "the verifier found nothing about parts of the prompt; verifier: checklist does")
        return WriterOutput(as_reflection(remedies, self._most))
