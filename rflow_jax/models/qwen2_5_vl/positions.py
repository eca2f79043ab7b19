"""Multimodal rotary positions: time, row and column of every token, worked out on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import Grid
from rflow_jax.typing import Int

PADDED = 1  # the position of padding, as the original has it; nothing depends on it


def rope_positions(
    ids: Int[np.ndarray, "b t"],
    lengths: Int[np.ndarray, " b"],
    grids: Sequence[Sequence[Grid]],
    config: Qwen25VLConfig,
) -> tuple[Int[np.ndarray, "3 b t"], Int[np.ndarray, " b"]]:
    """Positions of a batch, and the position after each sample's last.

    Text counts on all three axes alike. A picture's tokens share one time and count rows and columns, from where the
    text before it stopped; the text after it goes on from the largest of them.

    Args:
        ids: padded on the right; pictures' tokens already expanded.
        lengths: tokens of each sample before its padding.
        grids: of each sample's pictures, in order.

    Raises:
        InputError: runs of picture tokens that are not those of the pictures.
    """
    positions = np.full((3, *ids.shape), PADDED, np.int32)
    following = np.zeros(len(ids), np.int32)
    for k, (row, length, own) in enumerate(zip(ids, lengths, grids, strict=True)):
        parts = list(_parts(row[:length], own, config))
        placed = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), np.int32)
        positions[:, k, :length] = placed
        following[k] = placed.max(initial=-1) + 1
    return positions, following


def image_places(
    ids: Int[np.ndarray, "b t"],
    lengths: Int[np.ndarray, " b"],
    tokens: Sequence[Sequence[int]],
    config: Qwen25VLConfig,
    *,
    padded: int,
) -> Int[np.ndarray, "b t"]:
    """For every token the row of the pictures' tokens that takes its place, or -1.

    Args:
        tokens: of each sample's pictures; the batch's pictures lie one after another, each padded to ``padded``.
    """
    places = np.full(ids.shape, -1, np.int32)
    first = 0
    for row, length, own, place in zip(ids, lengths, tokens, places, strict=True):
        rows = [padded * (first + number) + np.arange(count) for number, count in enumerate(own)]
        where = np.flatnonzero(row[:length] == config.image_token_id)
        _check_count(len(where), sum(own))
        place[where] = np.concatenate(rows) if rows else []
        first += len(own)
    return places


def _parts(ids: np.ndarray, grids: Sequence[Grid], config: Qwen25VLConfig) -> Iterator[np.ndarray]:
    """The positions [3, ...] of each stretch of text and of each picture."""
    _check_count(int(np.sum(ids == config.image_token_id)), sum(_units(grid, config) for grid in grids))
    done = following = 0
    for grid in grids:
        start = done + int(np.argmax(ids[done:] == config.image_token_id))
        yield _text(following, start - done)
        following += start - done
        rows, columns = (side // config.vision.spatial_merge_size for side in grid[1:])
        row, column = np.divmod(np.arange(rows * columns), columns)
        yield (np.stack([np.zeros_like(row), row, column]) + following).astype(np.int32)
        following += max(rows, columns)
        done = start + rows * columns
        if np.any(ids[start:done] != config.image_token_id):
            raise InputError(f"the tokens of a picture of {rows} x {columns} are interrupted")
    yield _text(following, len(ids) - done)


def _text(first: int, count: int) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + count, dtype=np.int32), (3, count))


def _units(grid: Grid, config: Qwen25VLConfig) -> int:
    return grid[0] * grid[1] * grid[2] // config.vision.unit


def _check_count(found: int, wanted: int) -> None:
    if found != wanted:
        raise InputError(f"{found} tokens stand for pictures, but the pictures give {wanted}")
