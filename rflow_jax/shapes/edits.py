"""Scenes that fail their prompt, and the edits that make them right, as scenes and in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from rflow_jax.errors import InputError
from rflow_jax.shapes.grammar import (
    COLOR,
    COLOR_ATTR,
    COUNTING,
    INVERSE,
    NUMBERS,
    POSITION,
    SHAPES,
    SINGLE,
    TWO,
    Prompt,
    Wanted,
    plural,
    with_article,
)
from rflow_jax.shapes.scenes import (
    BORDER,
    MAX_ITEMS,
    SIZE,
    SLACK,
    SMALLEST,
    THING,
    Item,
    Scene,
    is_clear,
    is_clearly,
    is_related,
    judge_scene,
    place,
    random_color,
    random_jitter,
    subject,
)
from rflow_jax.verifiers.findings import as_reflection

MAX_SENTENCES = 2
_SECOND_ERROR = 0.25  # how often
_NEW_SIZE, _LARGEST = 16.0, 24.0  # half-sizes of items that are added or replaced, pixels
_FIRST = ("count", "exclude", "color", "position")  # the order in which failures are repaired


@dataclass(frozen=True)
class Edit:
    """A change of a scene.

    Attributes:
        action: "color", "replace", "add", "remove" or "move".
        noun: what is changed, such as "red star"; for "add" what is new.
        to: the new color, the new object, or the place ("left of the ring").
        count: how many of them.
    """

    action: str
    noun: str
    to: str = ""
    count: int = 1

    @property
    def text(self) -> str:
        """The edit as an order, one sentence."""
        number, several = NUMBERS[min(self.count, len(NUMBERS) - 1)], plural(self.noun)
        one = self.count == 1
        match self.action:
            case "color":
                return f"Make the {self.noun} {self.to}." if one else f"Make {number} {several} {self.to}."
            case "replace" if one:
                return f"Replace the {self.noun} with {with_article(self.to)}."
            case "replace":
                return f"Replace {number} {several} with {plural(self.to)}."
            case "add":
                return f"Add {with_article(self.noun) if one else f'{number} {several}'}."
            case "remove":
                return f"Remove {number} {self.noun if one else several}."
        return f"Move the {self.noun} {self.to}."


def reflection(edits: Sequence[Edit]) -> str:
    """The edits in words; of more than two the first two."""
    return as_reflection([edit.text for edit in edits], MAX_SENTENCES)


def _wrong_color(items: list[Item], prompt: Prompt, rng: Random) -> None:
    i = rng.randrange(len(items))
    items[i] = replace(items[i], color=random_color(rng, items[i].color), jitter=random_jitter(rng))


def _swapped_colors(items: list[Item], prompt: Prompt, rng: Random) -> None:
    i, j = rng.sample(range(len(items)), 2)
    a, b = items[i], items[j]
    items[i], items[j] = replace(a, color=b.color, jitter=b.jitter), replace(b, color=a.color, jitter=a.jitter)


def _wrong_shape(items: list[Item], prompt: Prompt, rng: Random) -> None:
    i = rng.randrange(len(items))
    items[i] = replace(items[i], shape=rng.choice([shape for shape in SHAPES if shape != items[i].shape]))


def _missing(items: list[Item], prompt: Prompt, rng: Random) -> None:
    items.pop(rng.randrange(len(items)))


def _too_many(items: list[Item], prompt: Prompt, rng: Random) -> None:
    one = rng.choice(items)
    color = one.color if rng.random() < 0.5 else random_color(rng)
    for half_size in (min(item.half_size for item in items), SMALLEST):
        new = place(items, replace(one, color=color, half_size=half_size, jitter=random_jitter(rng)), rng)
        if new is not None:
            items.append(new)
            return


def _moved(items: list[Item], prompt: Prompt, rng: Random) -> None:
    i, j = rng.sample(range(len(items)), 2)
    a, b = items[i], items[j]
    if rng.random() < 0.5:
        items[i], items[j] = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    else:
        items[i] = place([item for item in items if item is not a], a, rng) or a


_Spoiler = Callable[[list[Item], Prompt, Random], None]
_SPOILERS: dict[str, dict[_Spoiler, float]] = {  # and how often each is drawn
    SINGLE: {_wrong_shape: 0.85, _missing: 0.15},
    TWO: {_wrong_shape: 0.55, _missing: 0.45},
    COUNTING: {_wrong_shape: 0.2, _missing: 0.4, _too_many: 0.4},
    COLOR: {_wrong_color: 0.7, _wrong_shape: 0.2, _missing: 0.1},
    POSITION: {_moved: 0.6, _wrong_shape: 0.15, _missing: 0.25},
    COLOR_ATTR: {_wrong_color: 0.4, _swapped_colors: 0.25, _wrong_shape: 0.2, _missing: 0.15},
}
_COLORED_POSITION: dict[_Spoiler, float] = {
    _moved: 0.4,
    _wrong_color: 0.2,
    _swapped_colors: 0.15,
    _wrong_shape: 0.1,
    _missing: 0.15,
}


def spoil(scene: Scene, prompt: Prompt, rng: Random) -> Scene:
    """A scene that fails, made from one that does not: with one or two things wrong, and the rest as it was.

    Raises:
        InputError: the scene holds a thing, is crowded, or leaves its picture.
    """
    if not is_clear(scene):
        raise InputError("only a scene of known shapes, apart and within the picture, can be spoiled")
    spoilers = _COLORED_POSITION if prompt.relation and prompt.wanted[0].color else _SPOILERS[prompt.tag]
    while True:
        items = list(scene.items)
        for _ in range(2 if rng.random() < _SECOND_ERROR else 1):
            (spoiler,) = rng.choices(tuple(spoilers), tuple(spoilers.values()))
            if len(items) > (spoiler in (_swapped_colors, _moved)) and len(items) < MAX_ITEMS:
                spoiler(items, prompt, rng)
        spoiled = replace(scene, items=tuple(items))
        if is_clear(spoiled) and is_clearly(prompt, spoiled, correct=False):
            return spoiled


def repair(prompt: Prompt, scene: Scene, rng: Random | None = None) -> tuple[tuple[Edit, ...], Scene]:
    """The edits that make a scene right, and the scene that they lead to; all that they don't name keeps its place.

    Things, which nobody can draw again, are replaced or removed, but only if the scene fails.

    Args:
        scene: made, or read in a picture.
        rng: of the places and colors of new items; by default the same for every scene.

    Returns:
        no edits and the same scene if it is correct. Where a scene is too full the new one may be crowded, or still
        wrong: see :func:`is_clear` and :func:`judge_scene`.
    """
    rng = rng or Random(0)
    items, edits = list(scene.items), []
    for _ in range(2 * MAX_ITEMS):
        failures = judge_scene(prompt, replace(scene, items=tuple(items))).failures
        if not failures:
            break
        failure = min(failures, key=lambda one: _FIRST.index(one.requirement))
        wanted = prompt.wanted[1 - failure.entry] if prompt.relation else prompt.wanted[failure.entry]
        match failure.requirement:
            case "count":
                edits.append(_supply(items, prompt, wanted, rng))
            case "exclude":
                edits.append(_remove(items, wanted.shape))
            case "color":
                edits.append(_recolor(items, wanted, rng))
            case _:
                edits.append(_move(items, prompt, rng))
    while edits and any(item.shape == THING for item in items):
        edits.append(_remove(items, THING))
    return _merged(edits), replace(scene, items=tuple(items))


def _merged(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Equal edits as one, at the place of the first."""
    counts: dict[Edit, int] = {}
    for edit in edits:
        counts[edit] = counts.get(edit, 0) + 1
    return tuple(edit if edit.action == "move" else replace(edit, count=count) for edit, count in counts.items())


def _supply(items: list[Item], prompt: Prompt, wanted: Wanted, rng: Random) -> Edit:
    """Replaces an item that nobody asked for by one that is missing; adds one if there is none."""
    asked = {one.shape: one for one in prompt.wanted}
    numbers = {shape: sum(item.shape == shape for item in items) for shape in asked}
    spare = [
        i for i, item in enumerate(items) if item.shape not in asked or numbers[item.shape] > asked[item.shape].count
    ]

    def regret(i: int) -> tuple[bool, bool, bool, bool]:
        shape, color = items[i].shape, items[i].color
        kept_color = asked[shape].color if shape in asked else ""
        return shape != THING, shape in asked, color == kept_color, color != wanted.color

    if spare:
        i = min(spare, key=regret)
        old = items[i]
        half_size = min(max(old.half_size, SMALLEST), _LARGEST)
        low, high = half_size + BORDER, SIZE - half_size - BORDER
        x, y = (old.x, old.y) if half_size == old.half_size else (min(max(v, low), high) for v in (old.x, old.y))
        jitter = old.jitter if wanted.color in ("", old.color) else random_jitter(rng)
        items[i] = Item(wanted.shape, wanted.color or old.color, x, y, half_size, jitter)
        return Edit("replace", old.noun, wanted.noun)
    items.append(_new(items, prompt, wanted, rng))
    return Edit("add", wanted.noun)


def _new(items: Sequence[Item], prompt: Prompt, wanted: Wanted, rng: Random) -> Item:
    """A wanted item where there is room, and where the prompt wants it."""
    color = wanted.color or (items[0].color if items and prompt.tag == COUNTING else random_color(rng))
    average = sum(item.half_size for item in items) / len(items) if items else _NEW_SIZE
    average = min(max(average, SMALLEST), _NEW_SIZE)
    new = Item(wanted.shape, color, SIZE / 2, SIZE / 2, average, random_jitter(rng))
    for fits in (lambda item: _stands_well(prompt, [*items, item]), None):
        for half_size in (average, (average + SMALLEST) / 2, SMALLEST):
            if placed := place(items, replace(new, half_size=half_size), rng, fits):
                return placed
    return place([], replace(new, half_size=SMALLEST), rng) or new  # no room: upon others


def _stands_well(prompt: Prompt, items: Sequence[Item]) -> bool:
    """Whether the relation holds with some distance to its margin, if both of its items are there."""
    if not prompt.relation:
        return True
    a, b = (subject(items, wanted) for wanted in prompt.wanted)
    return a is None or b is None or is_related(a, prompt.relation, b, SLACK)


def _remove(items: list[Item], shape: str) -> Edit:
    smallest = min((item for item in items if item.shape == shape), key=lambda item: item.half_size)
    items.remove(smallest)
    return Edit("remove", smallest.noun if shape == THING else shape)


def _recolor(items: list[Item], wanted: Wanted, rng: Random) -> Edit:
    old = subject(items, wanted)
    assert old is not None  # a color fails only where there is an object
    items[items.index(old)] = replace(old, color=wanted.color, jitter=random_jitter(rng))
    return Edit("color", old.noun, wanted.color)


def _move(items: list[Item], prompt: Prompt, rng: Random) -> Edit:
    """Moves the first item of a relation, else the second, else exchanges the two or sets them side by side."""
    a, b = (subject(items, wanted) for wanted in prompt.wanted)
    assert a is not None  # a relation fails only where both are there
    assert b is not None
    nouns = [wanted.noun for wanted in prompt.wanted]
    edits = (
        Edit("move", nouns[0], f"{prompt.relation} the {nouns[1]}"),
        Edit("move", nouns[1], f"{INVERSE[prompt.relation]} the {nouns[0]}"),
    )
    for one, edit in zip((a, b), edits, strict=True):
        others = [item for item in items if item is not one]
        moved = place(others, one, rng, lambda item, others=others: _stands_well(prompt, [*others, item]))
        if moved is not None:
            items[items.index(one)] = moved
            return edit
    i, j = items.index(a), items.index(b)
    items[i], items[j] = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    if not _stands_well(prompt, items):
        x, y = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[prompt.relation]
        middle, step = SIZE / 2, SIZE / 4
        items[i] = replace(a, x=middle + x * step, y=middle + y * step)
        items[j] = replace(b, x=middle - x * step, y=middle - y * step)
    return edits[0]
