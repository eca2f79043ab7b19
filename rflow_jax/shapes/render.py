"""Pictures of scenes: one renderer for the host (NumPy) and for devices (inside ``jax.jit``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.shapes.grammar import SHAPES
from rflow_jax.shapes.outlines import FRAME, SAMPLES, distances
from rflow_jax.shapes.scenes import MAX_ITEMS, SIZE, Scene
from rflow_jax.typing import Array, Float, UInt8

EMPTY = -1.0  # in the place of a shape: nothing


def pack(scenes: Sequence[Scene], slots: int = MAX_ITEMS) -> tuple[np.ndarray, np.ndarray]:
    """The scenes as arrays for :func:`draw`.

    Returns:
        float32 [scenes, slots, 7]: index of the shape (:data:`EMPTY` for none), x, y, half-size, red, green, blue; and
        the backgrounds, float32 [scenes, 3].

    Raises:
        InputError: an item that is no known shape, or more items than slots.
    """
    items = np.full((len(scenes), slots, 7), EMPTY, np.float32)
    for row, scene in zip(items, scenes, strict=True):
        if len(scene.items) > slots:
            raise InputError(f"a scene of {len(scene.items)} items: at most {slots} can be drawn")
        for slot, item in enumerate(scene.items):
            if item.shape not in SHAPES:
                raise InputError(f"a scene with a {item.noun}: only {', '.join(SHAPES)} can be drawn")
            row[slot] = (SHAPES.index(item.shape), item.x, item.y, item.half_size, *item.rgb)
    return items, np.asarray([scene.background for scene in scenes], np.float32).reshape(len(scenes), 3)


def draw(
    items: Float[Array | np.ndarray, "b slots 7"], background: Float[Array | np.ndarray, "b 3"], xp: Any = np
) -> UInt8[Array | np.ndarray, "b 96 96 3"]:
    """Draws scenes, each slot over those before it.

    Args:
        items, background: as :func:`pack` returns them.
        xp: ``numpy`` or ``jax.numpy``.
    """
    picture = xp.broadcast_to(background[:, None, None, :], (len(items), SIZE, SIZE, 3))
    tables = xp.asarray(distances())
    for slot in range(items.shape[1]):
        shape, x, y, half_size, *_ = (items[:, slot, i] for i in range(7))
        table = tables[xp.maximum(shape, 0).astype(np.int32)]
        half_size = xp.maximum(half_size, 1)
        distance = _weights(y, half_size, xp) @ table @ xp.swapaxes(_weights(x, half_size, xp), 1, 2)
        # A pixel is covered by the share of it that lies inside, to first order.
        covered = xp.clip(0.5 - distance * half_size[:, None, None], 0, 1) * (shape >= 0)[:, None, None]
        picture = picture + covered[..., None] * (items[:, slot, None, None, 4:] - picture)
    return xp.round(xp.clip(picture, 0, 255)).astype(np.uint8)


def _weights(center: Any, half_size: Any, xp: Any) -> Any:
    """[b, SIZE, SAMPLES]: what interpolates a table linearly along one axis at the centers of the pixels."""
    pixels = xp.arange(SIZE, dtype=np.float32) + 0.5
    place = (pixels[None, :] - center[:, None]) / half_size[:, None]
    place = (xp.clip(place, -FRAME, FRAME) / FRAME + 1) * ((SAMPLES - 1) / 2)
    return xp.maximum(1 - xp.abs(place[..., None] - xp.arange(SAMPLES, dtype=np.float32)), 0)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene.

    Raises:
        InputError: an item that is no known shape.
    """
    return Image.fromarray(np.asarray(draw(*pack([scene], max(len(scene.items), 1)))[0]))
