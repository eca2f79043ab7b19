"""Runs an image network tile by tile and blends the tiles where they overlap.

The cuts and the blending are those of diffusers' ``AutoencoderKL``: a tile starts every 3/4 of a tile's side,
those at the right and the bottom end with the image, and a tile is faded in from its upper neighbour, then
from its left one, both already blended.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rflow_jax.typing import Array, Float

OVERLAP = 0.25  # of a tile's side


def apply_tiled(
    network: Callable[[Array], Array], x: Float[Array, "b height width c"], *, tile_in: int, tile_out: int
) -> Float[Array, "b height2 width2 o"]:
    """``network`` over overlapping tiles of ``x``.

    Tiles of one shape run one after the other through one compiled body (there are few shapes), so that the
    peak of memory is that of one tile.

    Args:
        network: [b, h, w, c] -> [b, h * tile_out / tile_in, w * tile_out / tile_in, o].
        tile_in, tile_out: the side of a tile before and after the network.
    """
    step = int(tile_in * (1 - OVERLAP))
    blend = int(tile_out * OVERLAP)
    tiles = [
        [x[:, top : top + tile_in, left : left + tile_in] for left in range(0, x.shape[2], step)]
        for top in range(0, x.shape[1], step)
    ]
    return _assemble(_run(network, tiles), blend, keep=tile_out - blend)


def _run(network: Callable[[Array], Array], tiles: list[list[Array]]) -> list[list[Array]]:
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for row, line in enumerate(tiles):
        for column, tile in enumerate(line):
            places.setdefault(tile.shape, []).append((row, column))
    results = [list(line) for line in tiles]
    for same_shape in places.values():
        done = jax.lax.map(network, jnp.stack([tiles[row][column] for row, column in same_shape]))
        for index, (row, column) in enumerate(same_shape):
            results[row][column] = done[index]
    return results


def _assemble(tiles: list[list[Array]], blend: int, keep: int) -> Array:
    lines: list[Array] = []
    above: list[Array] = []
    for line in tiles:
        blended: list[Array] = []
        for column, tile in enumerate(line):
            faded = _fade(above[column], tile, blend, axis=1) if above else tile
            blended.append(_fade(blended[-1], faded, blend, axis=2) if blended else faded)
        lines.append(jnp.concatenate([tile[:, :keep, :keep] for tile in blended], axis=2))
        above = blended
    return jnp.concatenate(lines, axis=1)


def _fade(before: Array, tile: Array, blend: int, axis: int) -> Array:
    """The first ``blend`` lines of ``tile`` go over linearly from the last lines of its neighbour."""
    blend = min(before.shape[axis], tile.shape[axis], blend)
    if blend == 0:
        return tile
    weight = jnp.arange(blend, dtype=jnp.float32) / blend
    weight = jnp.expand_dims(weight, tuple(k for k in range(tile.ndim) if k != axis))
    end = before.shape[axis]
    tail = jax.lax.slice_in_dim(before, end - blend, end, axis=axis)
    head = jax.lax.slice_in_dim(tile, 0, blend, axis=axis)
    rest = jax.lax.slice_in_dim(tile, blend, tile.shape[axis], axis=axis)
    faded = tail * (1 - weight) + head * weight
    return jnp.concatenate([faded.astype(tile.dtype), rest], axis=axis)
