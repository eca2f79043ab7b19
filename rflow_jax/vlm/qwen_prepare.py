"""One chat with its pictures -> tokens and patches, with an error for that chat alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import Grid
from rflow_jax.vlm.qwen_images import ImageRules, fitted, limited, patches_of
from rflow_jax.vlm.qwen_inputs import Sample, check_context
from rflow_jax.vlm.qwen_text import QwenTokenizer, expand_images, question
from rflow_jax.weights.components import read_object

T = TypeVar("T")
# What a picture that cannot be decoded raises, depending on its format and on how it is broken.
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError, EOFError, ValueError)


@dataclass(frozen=True)
class Preparation:
    """Turns chats into samples.

    Attributes:
        context: tokens that a sample may have.
        max_pixels: of a picture before the processor's own limits; None: those alone.
    """

    tokenizer: QwenTokenizer
    rules: ImageRules
    config: Qwen25VLConfig
    context: int
    max_pixels: int | None = None

    def sample(self, parts: Sequence[str | Image.Image], instructions: str | None = None) -> Sample:
        """A user's message of texts and pictures, up to where the answer begins.

        Raises:
            InputError: a picture that cannot be decoded, texts that name special tokens of pictures, a chat longer than
                the context.
        """
        pictures = tuple(self.picture(part) for part in parts if isinstance(part, Image.Image))
        told = question(*(part if isinstance(part, str) else None for part in parts), system=instructions)
        tokens = [grid[1] * grid[2] // self.config.vision.unit for _, grid in pictures]
        sample = Sample(self.tokenizer.encode(expand_images(self.tokenizer.chat(told), tokens)), pictures)
        check_context(sample, self.context)
        return sample

    def picture(self, image: Image.Image) -> tuple[np.ndarray, Grid]:
        """Patches and grid of a picture; raises InputError where it cannot be decoded."""
        try:
            if self.max_pixels is not None:
                image = limited(image, self.max_pixels, self.rules.factor)
            return patches_of(fitted(image, self.rules), self.rules)
        except InputError:
            raise
        except _UNREADABLE as error:
            raise InputError(f"a picture cannot be decoded ({str(error).strip() or type(error).__name__})") from error


def read_rules(folder: Path, config: Qwen25VLConfig) -> ImageRules:
    """The rules of a model folder's ``preprocessor_config.json``, or, as Transformers 5 writes it, of its processor's.

    Raises:
        InputError: there is none, or its patches are not those of the vision tower.
    """
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.is_file() or not whole.is_file():
        rules = ImageRules.from_json(read_object(path))
    else:
        path = whole
        rules = ImageRules.from_json(read_object(whole).get("image_processor") or {})
    for name, want in (
        ("patch_size", config.vision.patch_size),
        ("merge_size", config.vision.spatial_merge_size),
        ("temporal_patch_size", config.vision.temporal_patch_size),
    ):
        if getattr(rules, name) != want:
            raise InputError(f"{path}: {name} is {getattr(rules, name)}, the vision tower has {want}")
    return rules


def each(work: Callable[[int], T], count: int) -> tuple[dict[int, T], dict[int, str]]:
    """Does the work for each number; what fails for bad input has its reason, and the others go on."""
    done: dict[int, T] = {}
    failed: dict[int, str] = {}
    for number in range(count):
        try:
            done[number] = work(number)
        except InputError as error:
            failed[number] = str(error)
    return done, failed
