"""The arms of the scaling benchmark, and their writers: what is said where a reflection, or a picture, is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from rflow_jax.errors import InputError
from rflow_jax.search.config import Kind
from rflow_jax.shapes.grammar import parse
from rflow_jax.tokenizers.flux import t5_prompt
from rflow_jax.verifiers.findings import as_reflection, remedies_in
from rflow_jax.writers.base import WriterInput, WriterOutput


class Arm(NamedTuple):
    """A way to spend images.

    Attributes:
        title: in tables.
        kind: of the search.
        reflector, refiner: its writers.
        untrained: whether the corrector is one that has learned nothing.
    """

    title: str
    kind: Kind
    reflector: str = "rules"
    refiner: str = "rules"
    untrained: bool = False


ARMS = {
    "noise": Arm("noise, the verifier chooses", "noise"),
    "prompt": Arm("noise, prompts reworded", "noise-prompt", refiner="rflow_jax.shapes.arms:Rewording"),
    "reflection": Arm("reflection", "reflect"),
    "untrained": Arm("reflection, untrained corrector", "reflect", untrained=True),
    "silent": Arm("correction without a reflection", "reflect", reflector="rflow_jax.shapes.arms:Silence"),
    "blind": Arm("reflection without the picture", "noise-prompt", refiner="rflow_jax.shapes.arms:ReflectionInPrompt"),
}


class _Rule:
    """A writer without a model; its output follows from its input."""

    name, concurrency, batch_size = "rule", 1, 64

    def __init__(self, config: Any, default_prompt: Path, meter: Any = None):
        pass

    def write(self, cases: Sequence[WriterInput]) -> list[WriterOutput]:
        """One text a case, in order."""
        return [WriterOutput(self.text(case)) for case in cases]

    def close(self) -> None:
        """Does nothing: no calls are pending."""

    def text(self, case: WriterInput) -> str:
        """What is said of a case."""
        raise NotImplementedError


class Silence(_Rule):
    """Reflections that say nothing: the corrector sees the picture and the prompt alone."""

    name = "silence"

    def text(self, case: WriterInput) -> str:
        return ""


class Rewording(_Rule):
    """Refined prompts with the same content: what was not met comes first, or else the order is drawn."""

    name = "rewording"

    def text(self, case: WriterInput) -> str:
        try:
            prompt = parse(case.prompt)
        except InputError:
            return case.prompt
        missing = " ".join(remedies_in(case.evaluation) or [])
        rng = Random(f"{case.current_prompt}\n{missing}")
        others = [one for one in prompt.wordings() if one.text != case.current_prompt] or [prompt]
        urgent = [one for one in others if one.wanted[0].shape in missing.split(".")[0]]
        return rng.choice(urgent or others).text


class ReflectionInPrompt(_Rule):
    """Refined prompts with the reflection behind them, as the corrector's T5 reads it; the model sees no picture."""

    name = "reflection in prompt"

    def text(self, case: WriterInput) -> str:
        return t5_prompt(case.prompt, as_reflection(remedies_in(case.evaluation) or []))
