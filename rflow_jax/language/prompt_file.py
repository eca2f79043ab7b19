"""What a model that writes is told, in a file that users can replace; and what its answer comes down to.

A prompt file has two or three parts, divided by lines ``---``:

- the instructions;
- what is said about an earlier picture of the chain, once for each, followed by that picture: ``$number``, ``$count``,
  ``$reflection``, ``$evaluation``. Without this part the shipped one is taken;
- the question, followed by the picture in hand: ``$prompt`` (the original), ``$current_prompt``, ``$evaluation``,
  ``$last_reflection``, and for the refiner ``$new_reflection``.

``$$`` is a dollar sign.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

from rflow_jax.chat.prompt_file import read_prompt
from rflow_jax.errors import InputError


@dataclass(frozen=True)
class PromptFile:
    """What a prompt file holds."""

    instructions: str
    past: Template
    question: Template

    @classmethod
    def read(cls, path: Path, shipped: "PromptFile | None" = None) -> "PromptFile":
        """Reads a file.

        Args:
            shipped: has the middle part, if this file does not.

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


def in_one_line(answer: str) -> str:
    """The text in one line, without the quotation marks that models like to put around it; it may be empty."""
    text = " ".join(answer.split())
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    return text
