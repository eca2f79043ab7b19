"""Images as CLIP's own processor cuts them, with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL.Image import Image, Resampling

from rflow_jax.errors import InputError


@dataclass(frozen=True)
class ClipImages:
    """Resize, then the middle.

    Attributes:
        resized: pixels of the shortest side, or (height, width).
        side: pixels a side of the square that is cut out of the middle.
        resample: the filter.
    """

    resized: int | tuple[int, int]
    side: int
    resample: Resampling = Resampling.BICUBIC

    @classmethod
    def from_json(cls, content: Mapping[str, Any], side: int, where: str) -> ClipImages:
        """From the content of ``preprocessor_config.json``.

        Args:
            side: pixels a side that the network takes.

        Raises:
            InputError: the result would have another size; begins with ``where``.
        """
        size, crop = content.get("size", side), content.get("crop_size", side)
        try:
            resized = _resized(size)
            resample = Resampling(content.get("resample", Resampling.BICUBIC))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: size {size!r} or resample {content.get('resample')!r} is not known") from error
        cropped = content.get("do_center_crop", True)
        if cropped and crop not in (side, {"height": side, "width": side}):
            raise InputError(f"{where}: crop_size is {crop!r}, the network's images have {side} pixels a side")
        smallest = min(resized) if isinstance(resized, tuple) else resized
        fits = smallest >= side if cropped else resized == (side, side)
        if not fits or not content.get("do_resize", True):
            raise InputError(f"{where}: size {size!r} does not give images of {side} pixels a side")
        return cls(resized, side, resample)

    def cut(self, image: Image) -> np.ndarray:
        """An RGB image -> uint8 [side, side, 3]."""
        pixels = np.asarray(image.resize(self._size(*image.size), self.resample))
        top, left = ((length - self.side) // 2 for length in pixels.shape[:2])
        return pixels[top : top + self.side, left : left + self.side]

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if isinstance(self.resized, tuple):
            return self.resized[1], self.resized[0]
        long = int(self.resized * max(width, height) / min(width, height))
        return (self.resized, long) if width <= height else (long, self.resized)


def _resized(size: Any) -> int | tuple[int, int]:
    """Early files give a number, later ones a mapping."""
    if isinstance(size, int):
        return size
    return size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
