"""Scenes of colored shapes: what a picture shows, whether that is what a prompt asks for, and scenes made to be so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from rflow_jax.shapes.grammar import COLORS, Prompt, Wanted
from rflow_jax.shapes.outlines import extents
from rflow_jax.verifiers.geneval import Decision, Detection, Rules, decide, relations_of

SIZE = 96  # pixels of a picture, each way
THING = "thing"  # the class of what is no known shape
MAX_ITEMS = 8  # in a scene that is made here
GAP, BORDER = 4.0, 3.0  # pixels between items, and to the edge
SMALLEST = 10.5  # half-size, pixels
JITTER = 8.0  # of each channel of a color

_HALF_SIZES = {1: (14.0, 24.0), 2: (13.0, 19.0), 3: (12.0, 15.5), 4: (11.5, 13.5)}  # by the number of items
_MANY = (SMALLEST, 12.0)  # for more
SLACK = 0.05  # of the margin of relations: a pixel more or less must not decide
_TRIES = 40
_NAMES = tuple(COLORS)


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a scene.

    Attributes:
        shape: one of the grammar's, or :data:`THING`.
        color: the nearest of the grammar's.
        x, y: the center of the bounding box in pixels, from the upper left corner of the picture.
        half_size: pixels; about half of the longer side of the box.
        jitter: what is added to the color's red, green and blue, of 255.
    """

    shape: str
    color: str
    x: float
    y: float
    half_size: float
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def noun(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1."""
        width, height = (self.half_size * extent for extent in extents(self.shape))
        return self.x - width, self.y - height, self.x + width, self.y + height

    @property
    def rgb(self) -> tuple[float, ...]:
        return tuple(min(max(a + b, 0.0), 255.0) for a, b in zip(COLORS[self.color], self.jitter, strict=True))


@dataclass(frozen=True)
class Scene:
    """What a picture shows: its items, and the red, green and blue of the background, of 255."""

    items: tuple[Item, ...]
    background: tuple[float, float, float]


def prominence(item: Item) -> float:
    """The score that an item is detected with, above all of GenEval's thresholds: larger ones come first."""
    return 0.95 + 0.05 * min(item.half_size / SIZE, 1.0)


def detections(scene: Scene) -> dict[str, list[Detection]]:
    """The items by class, as GenEval's rules take them; the mask of each is its color."""
    found: dict[str, list[Detection]] = {}
    for item in scene.items:
        found.setdefault(item.shape, []).append(Detection(item.box, prominence(item), item.color))
    return found


def judge_scene(wanted: Prompt | Mapping[str, Any], scene: Scene) -> Decision:
    """Whether a scene is what a prompt, or GenEval's metadata of one, asks for, by GenEval's rules.

    Raises:
        InputError: the metadata is not GenEval's.
    """
    metadata = wanted.metadata if isinstance(wanted, Prompt) else wanted
    return decide(metadata, detections(scene), lambda _, objects: [detection.mask for detection in objects])


def is_related(a: Item, relation: str, b: Item, slack: float = 0.0) -> bool:
    """Whether GenEval's rules see ``a`` in this relation to ``b``; ``slack`` is added to their margin."""
    return relation in relations_of(a.box, b.box, Rules().position_margin + slack)


def is_clearly(prompt: Prompt, scene: Scene, correct: bool) -> bool:
    """Whether the rules' decision is this one, and remains it if the margin of relations changes a little."""
    if judge_scene(prompt, scene).correct != correct:
        return False
    if not prompt.relation or judge_scene(replace(prompt, relation=""), scene).failures:
        return True
    a, b = (subject(scene.items, wanted) for wanted in prompt.wanted)
    return a is None or b is None or is_related(a, prompt.relation, b, SLACK if correct else -SLACK) == correct


def subject(items: Sequence[Item], wanted: Wanted) -> Item | None:
    """The item that the rules take for one that a prompt asks for: the most prominent of its shape."""
    same = [item for item in reversed(items) if item.shape == wanted.shape]  # of equal ones the last, as the rules do
    return max(same, key=prominence, default=None)


def is_clear(scene: Scene) -> bool:
    """Whether a picture of the scene can be read again: known shapes, large enough, apart, within the picture."""
    return all(
        item.shape != THING and item.half_size >= SMALLEST - 1 and has_room(scene.items[:i], item, gap=2.0, border=1.0)
        for i, item in enumerate(scene.items)
    )


def has_room(others: Sequence[Item], item: Item, gap: float = GAP, border: float = BORDER) -> bool:
    """Whether the item is that far from the edge of the picture and, in x or in y, from the others."""
    low, high = item.half_size + border, SIZE - item.half_size - border
    inside = low <= item.x <= high and low <= item.y <= high
    return inside and _is_free(others, item.x, item.y, item.half_size + gap)


def _is_free(others: Sequence[Item], x: float, y: float, reach: float) -> bool:
    for other in others:  # a loop, since this is most of the time that a scene takes
        if abs(other.x - x) < reach + other.half_size and abs(other.y - y) < reach + other.half_size:
            return False
    return True


def random_jitter(rng: Random) -> tuple[float, float, float]:
    """A small change of a color's red, green and blue."""
    return rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER)


def random_color(rng: Random, *without: str) -> str:
    """The name of a color, but none of these."""
    return rng.choice([name for name in _NAMES if name not in without])


def place(others: Sequence[Item], item: Item, rng: Random, fits: Callable[[Item], bool] | None = None) -> Item | None:
    """The item anywhere where there is room for it and, if given, ``fits`` is true; None if no such place was found."""
    low, high = item.half_size + BORDER, SIZE - item.half_size - BORDER
    for _ in range(_TRIES):
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        if _is_free(others, x, y, item.half_size + GAP):
            placed = replace(item, x=x, y=y)
            if fits is None or fits(placed):
                return placed
    return None


def make_scene(prompt: Prompt, rng: Random) -> Scene:
    """A scene with what the prompt asks for and nothing else."""
    kinds = _kinds(prompt, rng)
    grey = rng.uniform(228.0, 246.0)
    red, green, blue = (min(grey + rng.uniform(-10.0, 10.0), 252.0) for _ in range(3))
    low, high = _HALF_SIZES.get(len(kinds), _MANY)
    while True:
        items = _arrange(kinds, rng.uniform(low, high), rng)
        if items is not None:
            scene = Scene(items, (red, green, blue))
            if not prompt.relation or is_clearly(prompt, scene, correct=True):
                return scene
            a, b = items
            scene = replace(scene, items=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))
            if is_clear(scene) and is_clearly(prompt, scene, correct=True):
                return scene
        high = low + 0.9 * (high - low)  # smaller ones fit more often


def _kinds(prompt: Prompt, rng: Random) -> list[tuple[str, str]]:
    """The shape and color of each item."""
    kinds = []
    for wanted in prompt.wanted:
        color = wanted.color or random_color(rng)
        uniform = rng.random() < 0.5
        for _ in range(wanted.count):
            kinds.append((wanted.shape, color))
            color = color if uniform else random_color(rng)
    if not prompt.relation:
        rng.shuffle(kinds)
    return kinds


def _arrange(kinds: Sequence[tuple[str, str]], half_size: float, rng: Random) -> tuple[Item, ...] | None:
    items: list[Item] = []
    for shape, color in kinds:
        half = max(half_size * rng.uniform(0.92, 1.08), SMALLEST)
        item = place(items, Item(shape, color, 0.0, 0.0, half, random_jitter(rng)), rng)
        if item is None:
            return None
        items.append(item)
    return tuple(items)
