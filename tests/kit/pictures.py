"""Pictures to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise and ramps."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([x * 3 % 256, y * 2 % 256, (x + y) % 256], axis=-1)
    return Image.fromarray((ramps // 2 + draw.integers(0, 128, (height, width, 3))).astype(np.uint8))
