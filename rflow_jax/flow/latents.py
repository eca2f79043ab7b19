"""Conversion between an image's grid of latents and the transformer's tokens, and positions of tokens."""

from __future__ import annotations

import numpy as np

from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.layers import Rope, rope_table
from rflow_jax.typing import Array, Float

PATCH = 2  # a token is a patch of 2 x 2 latents


def pack(latents: Float[Array, "b y x z"]) -> Float[Array, "b i f"]:
    """Grid of latents -> tokens in row order, each a patch with its channels outermost (f = 4 z)."""
    b, y, x, z = latents.shape
    grid = latents.reshape(b, y // PATCH, PATCH, x // PATCH, PATCH, z)
    return grid.transpose(0, 1, 3, 5, 2, 4).reshape(b, (y // PATCH) * (x // PATCH), z * PATCH * PATCH)


def unpack(tokens: Float[Array, "b i f"], y: int, x: int) -> Float[Array, "b y x z"]:
    """The inverse of :func:`pack` for a grid of ``y`` x ``x`` latents."""
    b, _, f = tokens.shape
    grid = tokens.reshape(b, y // PATCH, x // PATCH, f // PATCH**2, PATCH, PATCH)
    return grid.transpose(0, 1, 4, 2, 5, 3).reshape(b, y, x, f // PATCH**2)


def image_ids(rows: int, columns: int, delta: tuple[int, int] = (0, 0)) -> np.ndarray:
    """[rows * columns, 3] positions (0, row, column) of tokens, moved by ``delta``."""
    ids = np.zeros((rows, columns, 3), np.float32)
    ids[..., 1] = np.arange(rows)[:, None] + delta[0]
    ids[..., 2] = np.arange(columns)[None, :] + delta[1]
    return ids.reshape(-1, 3)


def text_ids(tokens: int) -> np.ndarray:
    """Text has no position: [tokens, 3] zeros."""
    return np.zeros((tokens, 3), np.float32)


def condition_delta(columns: int) -> tuple[int, int]:
    """The original's offset of the condition: left of the image, by its own width in tokens."""
    return (0, -columns)


def rope_for(config: FluxConfig, text: int, image: tuple[int, int], condition: tuple[int, int] | None = None) -> Rope:
    """Rotary angles of [text, image, condition].

    Args:
        text: number of text tokens.
        image, condition: rows and columns of tokens (pixels / 16).
    """
    ids = [text_ids(text), image_ids(*image)]
    if condition is not None:
        ids.append(image_ids(*condition, delta=condition_delta(condition[1])))
    return rope_table(np.concatenate(ids), config.axes_dims_rope, config.rope_theta)
