"""What the language models of a search do: write a reflection on an image, and refine its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL.Image import Image


@dataclass(frozen=True)
class Past:
    """An earlier image of a chain.

    Attributes:
        image: the image.
        reflection: what it was made with; empty for a first image.
        evaluation: the verifier's findings about it in words.
    """

    image: Image
    reflection: str
    evaluation: str


@dataclass(frozen=True)
class Case:
    """One image to write about.

    Attributes:
        image: the image.
        prompt: the original prompt.
        current_prompt: the prompt that the image was made with (the original or its last refinement).
        evaluation: the verifier's findings in words.
        last_reflection: the reflection that the image was made with; empty for a first image.
        reflection: for the refiner: the new reflection on the image, if there is one.
        history: images of its chain before it, oldest first.
    """

    image: Image
    prompt: str
    current_prompt: str
    evaluation: str
    last_reflection: str = ""
    reflection: str = ""
    history: tuple[Past, ...] = ()


@dataclass(frozen=True)
class Written:
    """A text, or None with the reason why there is none."""

    text: str | None
    error: str | None = None


@runtime_checkable
class Writer(Protocol):
    """Writes one text a case: a reflection generator, or a prompt refiner."""

    name: str
    """A short description for the record, such as "http gpt-4o"; never an address or a key."""

    concurrency: int
    """Calls of ``write`` that may run at once (1 for a model in this process)."""

    batch_size: int
    """Cases that a call takes at once (1 over HTTP)."""

    def write(self, cases: Sequence[Case]) -> list[Written]:
        """One text a case, in the order of the cases; never raises for a single case."""
        ...

    def close(self) -> None:
        """Gives up what is waiting in any thread; those cases come back without a text, with the reason."""
        ...
