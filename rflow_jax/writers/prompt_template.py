"""Prompt files with a model's instructions; users can replace them.

A line ``---`` divides the instructions, a part about each earlier image (which may be left out) and the question. An
image follows its part, or comes before it where the part begins with ``$image``.
"""

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


IMAGE = "$image"
Pair = tuple[str | Image, str | Image]  # a text and its image, in the order they are shown


@dataclass(frozen=True)
class Caption:
    """A text beside an image.

    Attributes:
        image_first: whether the image comes before it.
    """

    text: Template
    image_first: bool

    @classmethod
    def read(cls, text: str, path: Path) -> "Caption":
        """From a part of a prompt file; raises InputError if ``$image`` stands elsewhere than at an end of it."""
        first = text.startswith(IMAGE)
        text = (text.removeprefix(IMAGE) if first else text.removesuffix(IMAGE)).strip()
        if "image" in Template(text).get_identifiers():
            raise InputError(f"{path}: {IMAGE} must stand once, at the beginning or the end of a part")
        return cls(Template(text), first)

    def pair(self, image: Image, **values: object) -> Pair:
        """The text with its values, and the image."""
        text = self.text.safe_substitute(values)
        return (image, text) if self.image_first else (text, image)


@dataclass(frozen=True)
class PromptFile:
    """The parts of a prompt file."""

    instructions: str
    past: Caption
    question: Caption

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
        past = Caption.read(parts[1], path) if len(parts) == 3 or shipped is None else shipped.past
        return cls(parts[0], past, Caption.read(parts[-1], path))

    @classmethod
    def of(cls, own: str | Path | None, default: Path) -> "PromptFile":
        """The default file, or another.

        Args:
            own: a path, or the name of one that comes with the package; the part about earlier images is the default's
                if it has none.
        """
        shipped = cls.read(default)
        if not own:
            return shipped
        named = default.parent / f"{own}.md"
        return cls.read(named if named.is_file() and not Path(own).is_file() else Path(own), shipped)

    def messages(self, case: WriterInput) -> list[Pair]:
        """The texts and images of a case: its earlier images, the oldest first, and then the current one."""
        earlier = [
            self.past.pair(
                past.image,
                number=number,
                count=len(case.history),
                reflection=past.reflection or "none",
                evaluation=past.evaluation,
            )
            for number, past in enumerate(case.history, 1)
        ]
        question = self.question.pair(
            case.image,
            prompt=case.prompt,
            current_prompt=case.current_prompt,
            evaluation=case.evaluation,
            last_reflection=case.last_reflection or "none",
            new_reflection=case.reflection or "none",
        )
        return [*earlier, question]


def in_one_line(answer: str) -> str:
    """The text in one line, without the quotation marks that models like to put around it; it may be empty."""
    text = " ".join(answer.split())
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    return text
