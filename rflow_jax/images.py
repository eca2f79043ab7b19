"""Pictures on the host: sizes that the network can take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image


def fit_to_grid(image: Image.Image, grid: int) -> Image.Image:
    """RGB, with both sides cut down to multiples of ``grid`` pixels by resizing (Lanczos), as diffusers does."""
    width, height = (max(grid, side - side % grid) for side in image.size)
    image = image.convert("RGB")
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def condition_pixels(image: Image.Image, size: int) -> np.ndarray:
    """The condition as the network gets it: uint8 [size, size, 3], resized bicubically."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, as high as the highest."""
    height = max(image.height for image in images)
    scaled = [image.resize((image.width * height // image.height, height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled), height))
    left = 0
    for image in scaled:
        row.paste(image, (left, 0))
        left += image.width
    return row
