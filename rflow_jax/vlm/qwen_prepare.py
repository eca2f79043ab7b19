"""One chat with its pictures -> tokens and patches, with an error for that chat alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rflow_jax.each import require_fitting
from rflow_jax.errors import InputError
from rflow_jax.images import decoded
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import Grid
from rflow_jax.vlm.qwen_images import ImageRules, fitted, limited, patches_of
from rflow_jax.vlm.qwen_inputs import Sample
from rflow_jax.vlm.qwen_text import QwenTokenizer, expand_images, question
from rflow_jax.weights.components import naming, read_object


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
        ids = self.tokenizer.encode(expand_images(self.tokenizer.chat(told), tokens))
        require_fitting(len(ids), self.context)
        return Sample(ids, pictures)

    def picture(self, image: Image.Image) -> tuple[np.ndarray, Grid]:
        """Patches and grid of a picture; raises InputError where it cannot be decoded."""
        image = decoded(image)
        if self.max_pixels is not None:
            image = limited(image, self.max_pixels, self.rules.factor)
        return patches_of(fitted(image, self.rules), self.rules)


def read_rules(folder: Path, config: Qwen25VLConfig) -> ImageRules:
    """The rules of a model folder's ``preprocessor_config.json``, or, as Transformers 5 writes it, of its processor's.

    Raises:
        InputError: there is none, it cannot be used, or its patches are not those of the vision tower.
    """
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.is_file() or not whole.is_file():
        content = read_object(path)
    else:
        path = whole
        content = read_object(whole).get("image_processor") or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: image_processor is {content!r}; expected an object with keys")
    with naming(path):
        rules = ImageRules.from_json(content)
    for name, want in (
        ("patch_size", config.vision.patch_size),
        ("merge_size", config.vision.spatial_merge_size),
        ("temporal_patch_size", config.vision.temporal_patch_size),
    ):
        if getattr(rules, name) != want:
            raise InputError(f"{path}: {name} is {getattr(rules, name)}, the vision tower has {want}")
    return rules
