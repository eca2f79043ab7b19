"""Positions of pictures' patches and tokens, computed on the host from the pictures' sizes.

The processor returns the patches of a picture unit by unit: a unit is the square of patches that becomes one token, and
units are in row-major order. Most blocks attend within windows of whole units. The original reorders all patches by
window; here a window's patches are gathered for its attention and scattered back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig, VisionConfig
from rflow_jax.typing import Array, Int

Grid = tuple[int, int, int]  # frames, rows and columns of patches


class VisionLayout(NamedTuple):
    """The layout of a batch of pictures, each padded to ``p`` patches and ``w`` windows of ``s`` slots.

    Attributes:
        positions: row and column of every patch.
        lengths: patches of each picture, from 1.
        windows: the patch in every slot.
        window_lengths: slots in use of each window, from 1; they come first.
        slots: the slot of each patch, counted over all windows.
    """

    positions: Int[Array | np.ndarray, "b p 2"]
    lengths: Int[Array | np.ndarray, " b"]
    windows: Int[Array | np.ndarray, "b w s"]
    window_lengths: Int[Array | np.ndarray, "b w"]
    slots: Int[Array | np.ndarray, "b p"]


def layout_of(grids: Sequence[Grid], config: VisionConfig, *, patches: int, windows: int) -> VisionLayout:
    """The layout of pictures.

    Args:
        grids: of each picture; (0, 0, 0) for a filler row of the batch.
        patches, windows: padded sizes, at least those of the largest picture.
    """
    b, slots = len(grids), config.window_units**2 * config.unit
    layout = VisionLayout(
        np.zeros((b, patches, 2), np.int32),
        np.ones(b, np.int32),
        np.zeros((b, windows, slots), np.int32),
        np.ones((b, windows), np.int32),
        np.zeros((b, patches), np.int32),
    )
    for k, grid in enumerate(grids):
        if grid == (0, 0, 0):
            continue
        own = _own_layout(grid, config)
        count = len(own.positions)
        layout.positions[k, :count] = own.positions
        layout.lengths[k] = count
        layout.window_lengths[k, : len(own.lengths)] = own.lengths
        layout.windows[k, own.window, own.slot] = own.patch
        layout.slots[k, own.patch] = own.window * slots + own.slot
    return layout


class _OwnLayout(NamedTuple):
    """Of one picture: its patches' positions; patches of its windows; window, slot and place of each patch in order."""

    positions: np.ndarray
    lengths: np.ndarray
    window: np.ndarray
    slot: np.ndarray
    patch: np.ndarray


@lru_cache(maxsize=1024)  # a batch has few sizes
def _own_layout(grid: Grid, config: VisionConfig) -> _OwnLayout:
    check_grid(grid, config)
    order, lengths = window_order(grid, config)
    lengths = lengths[lengths > 0]
    window = np.repeat(np.arange(len(lengths)), lengths)
    slot = np.arange(grid[1] * grid[2]) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    patch = (order[:, None] * config.unit + np.arange(config.unit)).ravel()
    return _OwnLayout(patch_positions(grid, config), lengths, window, slot, patch)


def check_grid(grid: Grid, config: VisionConfig) -> None:
    """Raises InputError unless this is the grid of a picture of whole units."""
    merge = config.spatial_merge_size
    if grid[0] != 1:
        raise InputError(f"a picture of {grid[0]} frames: videos are not supported")
    if grid[1] < merge or grid[2] < merge or grid[1] % merge or grid[2] % merge:
        raise InputError(f"a picture of {grid[1]} x {grid[2]} patches, which are not multiples of {merge}")


def patch_positions(grid: Grid, config: VisionConfig) -> Int[np.ndarray, "p 2"]:
    """Row and column of every patch, in the processor's order."""
    _, rows, columns = grid
    merge = config.spatial_merge_size
    positions = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    units = positions.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return units.reshape(-1, 2)


def window_order(grid: Grid, config: VisionConfig) -> tuple[Int[np.ndarray, " u"], Int[np.ndarray, " w"]]:
    """The units of a picture window by window, and the patches of each window.

    As in the original, a side that windows fill exactly gets one more empty window.
    """
    _, rows, columns = (side // config.spatial_merge_size for side in grid)
    side = config.window_units
    down, across = rows // side + 1, columns // side + 1
    units = np.full((down * side, across * side), -1)
    units[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    windows = units.reshape(down, side, across, side).transpose(0, 2, 1, 3).reshape(down * across, side * side)
    return windows[windows >= 0], (windows >= 0).sum(axis=1) * config.unit


def window_count(grid: Grid, config: VisionConfig) -> int:
    """The number of a picture's non-empty windows."""
    rows, columns = (-(-side // (config.spatial_merge_size * config.window_units)) for side in grid[1:])
    return rows * columns


PADDED = 1  # the position of padding, as in the original; nothing depends on it


def rope_positions(
    ids: Int[np.ndarray, "b t"],
    lengths: Int[np.ndarray, " b"],
    grids: Sequence[Sequence[Grid]],
    config: Qwen25VLConfig,
) -> tuple[Int[np.ndarray, "3 b t"], Int[np.ndarray, " b"]]:
    """Positions of a batch, and the position after each sample's last.

    Text counts alike on all three axes. A picture's tokens share one time and count rows and columns, from the end of
    the text before it; the text after it continues from the largest of them.

    Args:
        ids: padded on the right; pictures' tokens already expanded.
        lengths: tokens of each sample before its padding.
        grids: of each sample's pictures, in order.

    Raises:
        InputError: the runs of picture tokens do not match the pictures.
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
    """For every token the row of the pictures' tokens that replaces it, or -1.

    Args:
        tokens: of each sample's pictures; the batch's pictures follow one another, each padded to ``padded``.
    """
    places = np.full(ids.shape, -1, np.int32)
    first = 0
    for row, length, own, out in zip(ids, lengths, tokens, places, strict=True):
        rows = [padded * (first + number) + np.arange(count) for number, count in enumerate(own)]
        indices = np.flatnonzero(row[:length] == config.image_token_id)
        _check_count(len(indices), sum(own))
        out[indices] = np.concatenate(rows) if rows else []
        first += len(own)
    return places


def _parts(ids: np.ndarray, grids: Sequence[Grid], config: Qwen25VLConfig) -> Iterator[np.ndarray]:
    """The positions [3, ...] of each stretch of text and of each picture."""
    units = [math.prod(grid) // config.vision.unit for grid in grids]
    _check_count(int(np.sum(ids == config.image_token_id)), sum(units))
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


def _check_count(found: int, wanted: int) -> None:
    if found != wanted:
        raise InputError(f"{found} tokens stand for pictures, but the pictures give {wanted}")
