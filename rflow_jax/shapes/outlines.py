"""The outlines of the shapes, and the distances to them as tables: what the renderer draws and the judge compares.

Coordinates are those of a frame with the center of the shape's bounding box at 0 and y downwards; its size is such
that shapes of the same half-size look equally large.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from rflow_jax.shapes.grammar import SHAPES

FRAME = 1.3  # the tables cover -FRAME to FRAME on both axes
SAMPLES = 81  # of a table, along each axis


def _arc(start: float, stop: float, radius: float = 1.0, center: float = 0.0, points: int = 90) -> np.ndarray:
    """float64 [points, 2] of a circle around (center, 0); angles in turns."""
    angle = 2 * np.pi * np.linspace(start, stop, points)
    return np.stack([center + radius * np.cos(angle), radius * np.sin(angle)], -1)


def _star(points: int = 5, inner: float = 0.45) -> np.ndarray:
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    angle = np.pi * np.arange(2 * points) / points
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], -1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 120)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], -1)


def _moon(bite: float = 0.75, shift: float = 0.55) -> np.ndarray:
    """A crescent: the unit circle without a circle of radius ``bite`` whose center is ``shift`` right of its own."""
    x = (1 + shift**2 - bite**2) / (2 * shift)  # where the two circles meet
    outer = np.arccos(x) / (2 * np.pi)
    inner = np.arccos((x - shift) / bite) / (2 * np.pi)
    return np.concatenate([_arc(outer, 1 - outer), _arc(1 - inner, inner, bite, shift)])


def _polygon(*corners: tuple[float, float]) -> np.ndarray:
    return np.asarray(corners, np.float64)


_ARM = 0.36  # half the width of an arm of the cross
_QUARTER = [(1.0, _ARM), (_ARM, _ARM), (_ARM, 1.0)]


def _contours(shape: str) -> tuple[float, list[np.ndarray]]:
    """The half-size in the frame, and closed polygons; inside is what an odd number of them encloses."""
    match shape:
        case "circle":
            return 0.95, [_arc(0, 1)]
        case "square":
            return 0.86, [_polygon((-1, -1), (1, -1), (1, 1), (-1, 1))]
        case "triangle":
            return 1.0, [_polygon((0, -1), (1, 0.8), (-1, 0.8))]
        case "star":
            return 1.05, [_star()]
        case "cross":
            quarter = np.asarray(_QUARTER)
            turns = [quarter @ np.linalg.matrix_power(np.asarray([[0, 1], [-1, 0]]), n) for n in range(4)]
            return 0.96, [np.concatenate(turns)]
        case "ring":
            return 1.0, [_arc(0, 1), _arc(0, 1, 0.56)]
        case "heart":
            return 1.0, [_heart()]
        case "moon":
            return 1.0, [_moon()]
    raise ValueError(shape)


@cache
def contours(shape: str) -> list[np.ndarray]:
    """The outline: closed polygons, float64 [points, 2]; inside is what an odd number of them encloses."""
    half_size, polygons = _contours(shape)
    points = np.concatenate(polygons)
    low, high = points.min(0), points.max(0)
    return [(polygon - (low + high) / 2) * (2 * half_size / (high - low).max()) for polygon in polygons]


@cache
def extents(shape: str) -> tuple[float, float]:
    """Half of the width and of the height, for a half-size of 1; those of an unknown shape are 1."""
    if shape not in SHAPES:
        return 1.0, 1.0
    x, y = np.concatenate(contours(shape)).max(0).tolist()
    return x, y


@cache
def distances() -> np.ndarray:
    """float32 [shapes, SAMPLES, SAMPLES]: the distance to the outline at (y, x), negative inside."""
    axis = np.linspace(-FRAME, FRAME, SAMPLES)
    points = np.stack(np.meshgrid(axis, axis), -1)
    return np.stack([_signed_distance(contours(shape), points) for shape in SHAPES]).astype(np.float32)


def _signed_distance(polygons: list[np.ndarray], points: np.ndarray) -> np.ndarray:
    nearest = np.full(points.shape[:-1], np.inf)
    inside = np.zeros(points.shape[:-1], bool)
    for polygon in polygons:
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            side, reach = np.asarray([x1 - x0, y1 - y0]), points - (x0, y0)
            along = np.clip(reach @ side / max(side @ side, 1e-12), 0, 1)
            nearest = np.minimum(nearest, np.linalg.norm(reach - along[..., None] * side, axis=-1))
            crossed = (y0 > points[..., 1]) != (y1 > points[..., 1])
            with np.errstate(divide="ignore", invalid="ignore"):
                inside ^= crossed & (points[..., 0] < x0 + (points[..., 1] - y0) * (x1 - x0) / (y1 - y0))
    return np.where(inside, -nearest, nearest)
