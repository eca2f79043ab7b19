"""One image -> the pictures that the tower looks at: tiles of a grid near its shape, and the whole as a thumbnail."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL.Image import Image


@dataclass(frozen=True)
class Tiling:
    """How an image is cut.

    Attributes:
        size: pixels a side of each picture.
        min_tiles, max_tiles: limits on the tiles, the thumbnail not counted.
    """

    size: int
    min_tiles: int = 1
    max_tiles: int = 12

    @property
    def most(self) -> int:
        """The most pictures that an image can become."""
        return self.max_tiles + (self.max_tiles > 1)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the grid whose shape is nearest to the image's.

        Of grids of the same shape the larger one is taken if it would enlarge the image to less than twice its area.
        """
        ratio = width / height
        best, smallest = (1, 1), float("inf")
        for columns, rows in _grids(self.min_tiles, self.max_tiles):
            difference = abs(ratio - columns / rows)
            enough = width * height > 0.5 * self.size**2 * columns * rows
            if difference < smallest or (difference == smallest and enough):
                best, smallest = (columns, rows), difference
        return best

    def cut(self, image: Image) -> np.ndarray:
        """uint8 [pictures, size, size, 3]: tiles row by row, then the thumbnail unless there is but one tile.

        Alpha is dropped, not composited. Raises what Pillow raises where the image cannot be decoded.
        """
        image = image.convert("RGB")
        columns, rows = self.grid(*image.size)
        whole = np.asarray(image.resize((columns * self.size, rows * self.size)))
        tiles = whole.reshape(rows, self.size, columns, self.size, 3).swapaxes(1, 2)
        tiles = tiles.reshape(-1, self.size, self.size, 3)
        return tiles if len(tiles) == 1 else np.concatenate([tiles, self.square(image)])

    def square(self, image: Image) -> np.ndarray:
        """uint8 [1, size, size, 3]: the whole image in one picture, its proportions lost."""
        return np.asarray(image.convert("RGB").resize((self.size, self.size)))[None]


@cache
def _grids(least: int, most: int) -> list[tuple[int, int]]:
    """(columns, rows) by their number of tiles."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])
