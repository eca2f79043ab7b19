"""Prompt files with a model's instructions; users can replace them."""

import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from PIL.Image import Image

from rflow_jax.errors import InputError
from rflow_jax.utils.files import read_text
from rflow_jax.writers.base import WriterInput

LARGEST_PROMPT = 2**20  # bytes; it is sent with every question


def read_prompt(path: Path) -> str:
    """The text of a prompt file.

    Raises:
        InputError: the file is missing or not text.
    """
    return read_text(path, "prompt file", LARGEST_PROMPT)


@dataclass(frozen=True)
class PromptFile:
    """The parts of a prompt file."""

    instructions: str
    past: Template
    question: Template

    @classmethod
    def read(cls, path: Path, shipped: "PromptFile | None" = None) -> "PromptFile":
        """Reads a file.

        Args:
            shipped: gives the middle part, if this file has none.

        Raises:
            InputError: it cannot be read, or has other parts.
        """
        parts = [part.strip() for part in re.split(r"^---\s*$", read_prompt(path), flags=re.MULTILINE)]
        if len(parts) not in (2, 3):
            raise InputError(
                f"{path}: a line --- must divide the instructions from the question; "
                f"a part about earlier pictures may stand between them"
            )
        past = Template(parts[1]) if len(parts) == 3 or shipped is None else shipped.past
        return cls(parts[0], past, Template(parts[-1]))

    @classmethod
    def of(cls, own: str | Path | None, default: Path) -> "PromptFile":
        """A user's own file if given, else the default; the part about earlier images defaults to the shipped one."""
        shipped = cls.read(default)
        return cls.read(Path(own), shipped) if own else shipped

    def messages(self, case: WriterInput) -> list[tuple[str, Image]]:
        """The texts and images of a case: its earlier images, the oldest first, and then the current one."""
        earlier = [
            self.past.safe_substitute(
                number=number,
                count=len(case.history),
                reflection=past.reflection or "none",
                evaluation=past.evaluation,
            )
            for number, past in enumerate(case.history, 1)
        ]
        question = self.question.safe_substitute(
            prompt=case.prompt,
            current_prompt=case.current_prompt,
            evaluation=case.evaluation,
            last_reflection=case.last_reflection or "none",
            new_reflection=case.reflection or "none",
        )
        shown = [past.image for past in case.history]
        return list(zip([*earlier, question], [*shown, case.image], strict=True))


def in_one_line(answer: str) -> str:
    """The text in one line, without the quotation marks that models like to put around it; it may be empty."""
    text = " ".join(answer.split())
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    return text
