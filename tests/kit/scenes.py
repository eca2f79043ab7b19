"""Pictures that mean something to a reader, and whose faults are known: simple things before a horizon.

A scene has defects: one kite is not there, a boat is red that should be blue. Its score and what a reflection says of
it follow from them.
"""

import io
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": "#d64541", "blue": "#3a6ea5", "yellow": "#f2c14e",
    "green": "#4f9d69", "orange": "#e8833a", "purple": "#7d5ba6",
}  # fmt: skip
SKIES = [
    ("#cfe5f2", "#b9d8a8"),
    ("#fbe3c4", "#d9b48f"),
    ("#d9d4ec", "#a9b7a1"),
    ("#f6d9d5", "#b6c9b0"),
    ("#dff1ea", "#9cbf9f"),
]
NUMBERS = ("no", "one", "two", "three", "four", "five")


def thing(kind: str, colour: str = "", count: int = 1) -> dict[str, Any]:
    """An entry of GenEval's ``include``."""
    return {"class": kind, "count": count, **({"color": colour} if colour else {})}


def entry(tag: str, prompt: str, *include: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a prompt file."""
    return {"tag": tag, "include": list(include), "prompt": f"a photo of {prompt}"}


ENTRIES = [
    entry("counting", "three kites", thing("kite", count=3)),
    entry("color_attr", "a blue boat and a red house", thing("boat", "blue"), thing("house", "red")),
    entry("position", "a tree left of a house", thing("tree", "green"), thing("house", "orange")),
    entry("single_object", "an umbrella", thing("umbrella", "purple")),
    entry("two_object", "a fish and a mug", thing("fish", "orange"), thing("mug", "blue")),
    entry("colors", "a yellow star", thing("star", "yellow")),
    entry("counting", "four apples", thing("apple", "red", count=4)),
    entry("color_attr", "a green umbrella and a yellow mug", thing("umbrella", "green"), thing("mug", "yellow")),
    entry("position", "a star right of a kite", thing("kite", "red"), thing("star", "yellow")),
    entry("single_object", "a boat", thing("boat", "red")),
    entry("two_object", "an apple and a kite", thing("apple", "green"), thing("kite", "blue")),
    entry("colors", "a purple house", thing("house", "purple")),
]


@dataclass
class Scene:
    """What one image shows.

    Attributes:
        defects: what is wrong, as words of :data:`DEFECTS`.
        look: seed of what is neither right nor wrong; a correction keeps its parent's.
        pose: seed of small differences; every image has its own.
    """

    entry: Mapping[str, Any]
    defects: set[str]
    look: int
    pose: int

    @property
    def score(self) -> float:
        """From 0 to 10."""
        detail = random.Random(self.pose).uniform(0, 0.8)
        return round(max(0.0, 9.8 - sum(DEFECTS[defect][0] for defect in self.defects) - detail), 2)


# Cost, and what a reflection says of it.
DEFECTS = {
    "count": (2.6, "There should be {number} {all}, and one is not there. Add it, beside the others."),
    "missing": (3.0, "The {last} is not in the picture. Add it next to the {first}."),
    "colour": (2.2, "The {last} has the wrong colour. Make it {colour}, and keep all else."),
    "swapped": (2.4, "The {all} have changed places. Swap them, as the prompt says."),
    "small": (1.1, "The {all} can hardly be seen. Draw larger, in the middle of the picture."),
    "tilt": (0.8, "All leans to one side. Set the {all} upright, on level ground."),
    "dull": (0.6, "The light is dull and the background grey. Use clear daylight."),
}


def things_of(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a prompt asks for; a boat where it does not say."""
    return list(entry.get("include") or [thing("boat")])


def said_of(defect: str, entry: Mapping[str, Any]) -> str:
    """A reflection on a defect."""
    things = things_of(entry)
    first, last = things[0], things[-1]
    return DEFECTS[defect][1].format(
        number=NUMBERS[first["count"]],
        all=" and the ".join(one["class"] + ("s" if one["count"] > 1 else "") for one in things),
        first=first["class"],
        last=last["class"],
        colour=last.get("color"),
    )


def possible_defects(entry: Mapping[str, Any]) -> list[str]:
    """Those that make sense for a prompt."""
    own = {"counting": ["count"], "colors": ["colour"], "color_attr": ["colour", "missing"]}
    own |= {"position": ["swapped", "missing"], "two_object": ["missing"]}
    return [*own.get(entry.get("tag", ""), []), "small", "tilt", "dull"]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(scene: Scene, size: int = 256) -> bytes:
    """A scene as PNG."""
    rng, pose = random.Random(scene.look), random.Random(scene.pose)
    sky, ground = ("#b9b9b6", "#8f918c") if "dull" in scene.defects else rng.choice(SKIES)
    canvas = Image.new("RGBA", (2 * size, 2 * size), sky)
    horizon = rng.uniform(0.58, 0.74) * 2 * size
    ImageDraw.Draw(canvas).rectangle((0, horizon, 2 * size, 2 * size), ground)
    things = [one for one in things_of(scene.entry) for _ in range(one["count"])]
    if {"count", "missing"} & scene.defects:
        things = things[:-1]
    if "swapped" in scene.defects:
        things = things[::-1]
    width = min(0.44, 0.86 / len(things)) * (0.5 if "small" in scene.defects else 1)
    for k, one in enumerate(things):
        colour = one.get("color") or rng.choice(list(COLOURS))
        if "colour" in scene.defects and one == things_of(scene.entry)[-1]:
            colour = next(name for name in COLOURS if name != colour)
        side = int(width * 2 * size)
        shape = Image.new("RGBA", (side, side))
        DRAWN[one["class"]](ImageDraw.Draw(shape), side, COLOURS[colour])
        lean = pose.choice((-1, 1)) * (pose.uniform(28, 50) if "tilt" in scene.defects else pose.uniform(0, 4))
        shape = shape.rotate(lean, resample=Image.Resampling.BICUBIC)
        x = 2 * size * ((k + 0.5) / len(things) * 0.9 + 0.05 + pose.uniform(-0.02, 0.02)) - side / 2
        y = 2 * size * (0.56 + pose.uniform(-0.06, 0.06)) - side / 2
        canvas.alpha_composite(shape, (max(0, int(x)), int(y)))
    return png(canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def _polygon(fill: str, *points: tuple[float, float]) -> Callable[[ImageDraw.ImageDraw, int], None]:
    """Draws a polygon whose corners are given in shares of the side."""
    return lambda draw, side: draw.polygon([(x * side, y * side) for x, y in points], fill=fill)


def _kite(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    draw.line([(0.5 * s, 0.66 * s), (0.42 * s, 0.78 * s), (0.56 * s, 0.86 * s), (0.48 * s, 0.98 * s)], "#555", s // 40)
    _polygon(colour, (0.5, 0.04), (0.78, 0.3), (0.5, 0.68), (0.22, 0.3))(draw, s)
    draw.line([(0.5 * s, 0.04 * s), (0.5 * s, 0.68 * s)], "#fff", s // 50)
    draw.line([(0.22 * s, 0.3 * s), (0.78 * s, 0.3 * s)], "#fff", s // 50)


def _boat(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    _polygon("#fffdf6", (0.53, 0.1), (0.53, 0.62), (0.86, 0.62))(draw, s)
    _polygon("#efe9da", (0.47, 0.2), (0.47, 0.62), (0.2, 0.62))(draw, s)
    draw.line([(0.5 * s, 0.06 * s), (0.5 * s, 0.7 * s)], "#6b5138", s // 36)
    _polygon(colour, (0.08, 0.66), (0.92, 0.66), (0.78, 0.9), (0.22, 0.9))(draw, s)


def _house(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    draw.rectangle((0.2 * s, 0.45 * s, 0.8 * s, 0.92 * s), colour)
    _polygon("#5b4a45", (0.12, 0.47), (0.5, 0.12), (0.88, 0.47))(draw, s)
    draw.rectangle((0.43 * s, 0.64 * s, 0.57 * s, 0.92 * s), "#4a3a33")
    for x in (0.27, 0.64):
        draw.rectangle((x * s, 0.55 * s, (x + 0.09) * s, 0.66 * s), "#fdf3c9")


def _tree(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    draw.rectangle((0.45 * s, 0.6 * s, 0.55 * s, 0.95 * s), "#6b5138")
    for x, y, r in ((0.5, 0.28, 0.22), (0.34, 0.46, 0.2), (0.66, 0.46, 0.2), (0.5, 0.5, 0.2)):
        draw.ellipse(((x - r) * s, (y - r) * s, (x + r) * s, (y + r) * s), colour)


def _umbrella(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    draw.line([(0.5 * s, 0.12 * s), (0.5 * s, 0.86 * s)], "#4b4b4b", s // 32)
    draw.arc((0.38 * s, 0.78 * s, 0.5 * s + s // 64, 0.94 * s), 0, 180, "#4b4b4b", s // 32)
    draw.pieslice((0.06 * s, 0.14 * s, 0.94 * s, 1.0 * s), 180, 360, colour)
    for x in (0.06, 0.353, 0.647):
        draw.ellipse((x * s, 0.5 * s, (x + 0.293) * s, 0.64 * s), (0, 0, 0, 0))


def _fish(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    _polygon(colour, (0.68, 0.5), (0.96, 0.3), (0.96, 0.7))(draw, s)
    draw.ellipse((0.06 * s, 0.3 * s, 0.78 * s, 0.7 * s), colour)
    draw.ellipse((0.2 * s, 0.42 * s, 0.27 * s, 0.49 * s), "#fff")
    draw.ellipse((0.22 * s, 0.44 * s, 0.255 * s, 0.475 * s), "#222")


def _mug(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    draw.arc((0.58 * s, 0.36 * s, 0.92 * s, 0.74 * s), 270, 90, colour, s // 14)
    draw.rounded_rectangle((0.2 * s, 0.26 * s, 0.74 * s, 0.88 * s), s // 16, colour)
    draw.ellipse((0.2 * s, 0.2 * s, 0.74 * s, 0.34 * s), "#f7f2ea")
    draw.ellipse((0.24 * s, 0.225 * s, 0.7 * s, 0.325 * s), "#5a4034")


def _star(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    radii = [(0.46, 0.2)[k % 2] for k in range(10)]
    corners = [(0.5 + r * math.sin(k * math.pi / 5), 0.5 - r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]
    _polygon(colour, *corners)(draw, s)


def _apple(draw: ImageDraw.ImageDraw, s: int, colour: str) -> None:
    for x in (0.14, 0.36):
        draw.ellipse((x * s, 0.28 * s, (x + 0.5) * s, 0.9 * s), colour)
    draw.line([(0.5 * s, 0.34 * s), (0.55 * s, 0.12 * s)], "#5a4034", s // 26)
    _polygon("#5f9e54", (0.55, 0.2), (0.68, 0.08), (0.82, 0.14), (0.7, 0.24))(draw, s)


DRAWN: dict[str, Callable[[ImageDraw.ImageDraw, int, str], None]] = {
    "kite": _kite, "boat": _boat, "house": _house, "tree": _tree, "umbrella": _umbrella, "fish": _fish, "mug": _mug,
    "star": _star, "apple": _apple,
}  # fmt: skip
