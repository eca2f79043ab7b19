"""A pipeline without a model: small pictures that follow from everything that the real one depends on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import PIL.Image
from PIL.Image import Image

from rflow_jax.settings import Settings


@dataclass
class FakePipeline:
    """Has the interface of ``rflow_jax.pipeline.Pipeline`` and remembers its calls."""

    lora: bool = True
    calls: list[dict[str, Any]] = field(default_factory=list)

    def resolve(self, settings: Settings) -> Settings:
        """The settings with FLUX.1-dev's numbers where they leave these open."""
        steps, length = settings.num_inference_steps or 30, settings.max_sequence_length or 512
        return replace(settings, num_inference_steps=steps, max_sequence_length=length)

    def without_lora(self) -> "FakePipeline":
        """The same without the corrector; calls are remembered together."""
        return FakePipeline(lora=False, calls=self.calls)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[Any],
        conditions: Sequence[Image] | None = None,
        reflections: Sequence[str | None] | None = None,
        refined_prompts: Sequence[str | None] | None = None,
        settings: Settings = Settings(),
        on_images: Callable[[int, list[Image]], None] | None = None,
    ) -> list[Image]:
        """One picture a prompt, in batches."""
        count = len(prompts)
        conditions = list(conditions) if conditions is not None else []
        reflections, refined = list(reflections or [None] * count), list(refined_prompts or [None] * count)
        columns = (prompts, seeds, reflections, refined)
        assert all(len(column) == count for column in columns)
        assert len(conditions) in (0, count)
        self.calls.append({"lora": self.lora, "prompts": list(prompts), "conditions": conditions})
        images: list[Image] = []
        for start in range(0, count, settings.batch_size):
            stop = min(start + settings.batch_size, count)
            rows = zip(*(column[start:stop] for column in columns), strict=True)
            seen = [hashlib.sha256(one.tobytes()).hexdigest() for one in conditions[start:stop]]
            seen = seen or [""] * (stop - start)
            batch = [_picture((self.lora, *row, mark)) for row, mark in zip(rows, seen, strict=True)]
            images += batch
            if on_images:
                on_images(start, batch)
        return images


def _picture(key: Any) -> Image:
    rng = np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))
    return PIL.Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
