"""The exact detector of the drawn shapes: reads a picture into a scene, which GenEval's rules then judge.

A pixel is a mixture of the background and one color of the palette; connected pixels that are at least half of one
color are a region, and a region is the shape whose outline, scaled to the same area, it matches best.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from rflow_jax.errors import InputError
from rflow_jax.shapes.grammar import COLORS, SHAPES, Prompt
from rflow_jax.shapes.outlines import FRAME, SAMPLES, distances
from rflow_jax.shapes.scenes import SIZE, THING, Item, Scene, judge_scene
from rflow_jax.utils.images import condition_pixels
from rflow_jax.verifiers.geneval import Decision

MIN_AREA = 40  # pixels; what is smaller is no object
MIN_IOU, MIN_LEAD = 0.82, 0.04  # of the best shape, and its lead over the second best
MAX_JITTER = 16.0  # of a color that is read
_NAMES = tuple(COLORS)
_PALETTE = np.asarray(list(COLORS.values()), np.float32)
_EIGHT_NEIGHBORS = np.ones((3, 3), bool)


def judge(wanted: Prompt | Mapping[str, Any], picture: Image.Image | np.ndarray) -> Decision:
    """Whether a picture shows what a prompt, or GenEval's metadata of one, asks for.

    Raises:
        InputError: no picture, or metadata that is not GenEval's.
    """
    return judge_scene(wanted, read(picture))


def read(picture: Image.Image | np.ndarray) -> Scene:
    """The scene that a picture shows, its items from left to right; what is no known shape is a "thing".

    Args:
        picture: of any size; as an array uint8 [96, 96, 3].

    Raises:
        InputError: an array of another shape or dtype, or an image that cannot be decoded.
    """
    pixels = condition_pixels(picture, SIZE) if isinstance(picture, Image.Image) else picture
    if pixels.shape != (SIZE, SIZE, 3) or pixels.dtype != np.uint8:
        raise InputError(f"a picture of {pixels.dtype} {list(pixels.shape)}: uint8 [{SIZE}, {SIZE}, 3] was expected")
    edge = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, [0, 1, -2, -1]].reshape(-1, 3)]
    )
    background = np.median(edge, axis=0).astype(np.float32)
    colors = _colors(pixels.astype(np.float32), background)
    items, labels = [], np.empty((SIZE, SIZE), np.int32)
    for color in np.unique(colors[colors >= 0]):
        ndimage.label(colors == color, _EIGHT_NEIGHBORS, output=labels)
        for label, window in enumerate(ndimage.find_objects(labels), 1):
            y, x = np.nonzero(labels[window] == label)
            if len(x) >= MIN_AREA:
                items.append(_item(x + window[1].start, y + window[0].start, pixels))
    red, green, blue = background.tolist()
    return Scene(tuple(sorted(items, key=lambda item: item.x)), (red, green, blue))


def _colors(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """int64 [SIZE, SIZE]: the color that makes up most of each pixel; -1 for the background."""
    offsets, directions = (pixels - background).reshape(-1, 3), _PALETTE - background
    lengths = np.maximum((directions**2).sum(-1), 1.0)
    products = offsets @ directions.T
    shares = np.clip(products / lengths, 0.0, 1.0)
    # The squared distance to the mixture, without the term that is the same for all colors.
    best = (shares * (shares * lengths - 2 * products)).argmin(-1)
    covered = np.take_along_axis(shares, best[:, None], -1)[:, 0] > 0.5
    return np.where(covered, best, -1).reshape(SIZE, SIZE)


@cache
def _moments() -> tuple[np.ndarray, np.ndarray]:
    """The area of each shape, [shapes], and its centroid (x, y), [shapes, 2]; for a half-size of 1."""
    inside = distances() < 0
    axis = np.linspace(-FRAME, FRAME, SAMPLES)
    number = inside.sum((1, 2))
    centroid = np.stack([(inside.sum(1) * axis).sum(-1), (inside.sum(2) * axis).sum(-1)], -1) / number[:, None]
    return number * (axis[1] - axis[0]) ** 2, centroid


def _item(x: np.ndarray, y: np.ndarray, pixels: np.ndarray) -> Item:
    """The object whose pixels are these (columns and rows)."""
    rgb = np.median(pixels[y, x], axis=0)
    color = int(((_PALETTE - rgb) ** 2).sum(-1).argmin())
    red, green, blue = np.clip(rgb - _PALETTE[color], -MAX_JITTER, MAX_JITTER).tolist()
    areas, centroids = _moments()
    half_sizes = np.sqrt(len(x) / areas)
    centers = np.asarray([x.mean() + 0.5, y.mean() + 0.5]) - centroids * half_sizes[:, None]
    overlaps = _overlaps(x, y, centers, half_sizes)
    ious = overlaps / (2 - overlaps)
    second, best = np.argsort(ious)[-2:].tolist()
    if ious[best] >= MIN_IOU and ious[best] - ious[second] >= MIN_LEAD:
        shape, (center_x, center_y), half_size = SHAPES[best], centers[best].tolist(), float(half_sizes[best])
    else:
        shape, half_size = THING, float(max(np.ptp(x), np.ptp(y)) + 1) / 2
        center_x, center_y = (float(v.min() + v.max() + 1) / 2 for v in (x, y))
    return Item(shape, _NAMES[color], center_x, center_y, half_size, (red, green, blue))


def _overlaps(x: np.ndarray, y: np.ndarray, centers: np.ndarray, half_sizes: np.ndarray) -> np.ndarray:
    """[shapes]: the share of the pixels that lies within each shape of the same area at its own center."""
    scale = (SAMPLES - 1) / (2 * FRAME) / half_sizes[:, None]
    columns = np.rint((x + 0.5 - centers[:, :1]) * scale + (SAMPLES - 1) / 2).astype(np.intp)
    rows = np.rint((y + 0.5 - centers[:, 1:]) * scale + (SAMPLES - 1) / 2).astype(np.intp)
    known = (columns >= 0) & (columns < SAMPLES) & (rows >= 0) & (rows < SAMPLES)
    columns, rows = columns.clip(0, SAMPLES - 1), rows.clip(0, SAMPLES - 1)
    return ((distances()[np.arange(len(SHAPES))[:, None], rows, columns] < 0) & known).mean(-1)
