"""Turns a record into a training example: one crop of both images, two texts, and random drops."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import Record, RecordError
from rflow_jax.data.sampling import random_words
from rflow_jax.tokenizers.flux import t5_prompt
from rflow_jax.utils.images import PictureError, image_in

try:
    from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer
except ImportError:  # not built for this platform
    _resizer = None
else:
    _resizer = Resizer()
    _CATMULL_ROM = ResizeOptions(ResizeAlg.convolution(FilterType.catmull_rom))  # the cubic that Pillow has, too

EXAMPLE = 5  # the stream of random bits, beside those of sampling.py
SHORTEST_REFLECTION = 5  # letters; the original treats a shorter one as none
NEVER_BLACK = "editing"
# Longer edge to shorter, at most: a picture is resized as a whole before it is cut. At a target of 1024 pixels this is
# 25 MB, and a strip of 8 by 4000 would be 1.6 GB.
LONGEST_RATIO = 8.0
BICUBIC = Image.Resampling.BICUBIC


class Example(NamedTuple):
    """One training example on the host.

    Attributes:
        good, bad: uint8 [y, y, 3] and [v, v, 3], squares of ``target_size`` and ``condition_size`` pixels.
        prompt: CLIP's text.
        t5_text: T5's text.
    """

    good: np.ndarray
    bad: np.ndarray
    prompt: str
    t5_text: str
    key: str
    subset: str


class Drops(NamedTuple):
    """What is dropped: T5's text, the condition image (it is black then), the reflection in T5's text."""

    text: bool
    image: bool
    reflection: bool


def uniforms(seed: int, number: int) -> list[float]:
    """Five numbers in [0, 1) of a sample: two for its crop, and one for each drop."""
    return ((random_words(seed, EXAMPLE, (number, 0), 5) >> np.uint64(11)) * 2.0**-53).tolist()


def draw_drops(config: DataConfig, seed: int, number: int, subset: str, reflection: str) -> Drops:
    """What is dropped from a sample; with a black condition there is nothing to reflect on."""
    *_, text, image, reflected = uniforms(seed, number)
    black = subset != NEVER_BLACK and image < config.drop_image_prob
    short = len(reflection.strip()) < SHORTEST_REFLECTION
    return Drops(text < config.drop_text_prob, black, black or short or reflected < config.drop_reflection_prob)


def t5_text(prompt: str, reflection: str, drops: Drops) -> str:
    """T5's input."""
    return "" if drops.text else t5_prompt(prompt, None if drops.reflection else reflection)


def make_example(record: Record, config: DataConfig, seed: int, number: int) -> Example:
    """The example of a sample; all its randomness follows from the seed and the sample's number."""
    drops = draw_drops(config, seed, number, record.subset, record.reflection)
    down, right = uniforms(seed, number)[:2] if config.crop == "random" else (None, None)
    good, bad = pictures(record, config, down, right)
    if drops.image:
        bad = np.zeros_like(bad)
    text = t5_text(record.prompt, record.reflection, drops)
    return Example(good, bad, record.prompt, text, record.key, record.subset)


def pictures(
    record: Record, config: DataConfig, down: float | None = None, right: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(good, bad), uint8 [y, y, 3] and [v, v, 3]: the same square of both, the bad one made smaller.

    Args:
        down, right: position of the square within the free room, in [0, 1); None is the middle.

    Raises:
        RecordError: a picture cannot be decoded, or is too long a strip.
    """
    good = decode(record.good_image, f"{record.key}: good_image", LONGEST_RATIO)
    bad = decode(record.bad_image, f"{record.key}: bad_image", LONGEST_RATIO)
    side = config.target_size
    # The shorter edge becomes ``side``; rounds down, as torchvision does.
    width, height = good.size
    size = (side, side * height // width) if width <= height else (side * width // height, side)

    def start(room: int, fraction: float | None) -> int:
        return round(room / 2) if fraction is None else int(fraction * (room + 1))

    left, top = start(size[0] - side, right), start(size[1] - side, down)
    box = left, top, left + side, top + side
    try:
        bad = _crop(_resize(_resize(bad, good.size), size), box)
        return np.asarray(_crop(_resize(good, size), box)), np.asarray(_resize_square(bad, config.condition_size))
    except MemoryError as error:
        raise RecordError(f"{record.key}: not enough memory to resize its pictures") from error


def decode(content: bytes, name: str, longest_ratio: float = math.inf) -> Image.Image:
    """An image in RGB, read as everywhere else (:func:`rflow_jax.utils.images.image_in`).

    Args:
        longest_ratio: longer to shorter edge; beyond it the image is not decoded.

    Raises:
        RecordError: it is not an image, is truncated, too large or too elongated.
    """
    try:
        return image_in(content, longest_ratio)
    except PictureError as error:
        raise RecordError(f"{name} cannot be decoded ({error.reason})") from error


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, BICUBIC)


def _crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


def _resize_square(image: Image.Image, side: int) -> Image.Image:
    """Pillow's bicubic to within 1/255; Pillow itself is six times slower, and every training sample needs this."""
    # To a half, a third and so on: between those the faster one's rounded weights are off by 2/255 now and then.
    if _resizer is None or image.width <= side or image.width % side:
        return _resize(image, (side, side))
    # Width first, then height, rounded between, as Pillow does: in one call the rounding differs by far more than 1.
    for size in ((side, image.height), (side, side)):
        smaller = Image.new("RGB", size)
        _resizer.resize_pil(image, smaller, _CATMULL_ROM)
        image = smaller
    return image
