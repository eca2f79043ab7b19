"""Prompts about colored shapes, in the wording and with the six tags of GenEval, and which of them are held out.

No training prompt implies a held-out one: if "a ring left of a star" is held out, so are "a star right of a ring" and
"a red star right of a blue ring". There are two exceptions. Every prompt implies a single object, so they serve for
both. And shapes that training never names together without colors it does name together with colors or a relation:
text encoders that see two shapes together nowhere at all learn that these exclude each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice, permutations, zip_longest
from random import Random
from typing import Any, NamedTuple
from zlib import crc32

from rflow_jax.errors import InputError
from rflow_jax.verifiers.geneval import COUNTING, RELATIONS

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLORS = {  # sRGB
    "red": (222, 42, 46),
    "orange": (246, 130, 24),
    "yellow": (250, 208, 40),
    "green": (36, 158, 74),
    "blue": (42, 92, 222),
    "purple": (142, 58, 190),
    "pink": (246, 120, 186),
    "black": (32, 32, 36),
}
SINGLE, TWO, COLOR, POSITION, COLOR_ATTR = "single_object", "two_object", "colors", "position", "color_attr"
TAGS = (SINGLE, TWO, COUNTING, COLOR, POSITION, COLOR_ATTR)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_COUNT, MAX_OBJECTS = 5, 3
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_NAMES = list(COLORS)
_PREFIX = "a photo of "
_ITEM = re.compile(rf"an? (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})")
_EXAMPLES = (
    "expected such as 'a photo of two stars', 'a photo of a red star', 'a photo of a star, a ring and a heart' or "
    "'a photo of a red star left of a blue ring'"
)


def plural(shape: str) -> str:
    """The word for several of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(noun: str) -> str:
    """A noun, perhaps with a color before it, after its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Wanted:
    """Objects that a prompt asks for; an empty color is any."""

    shape: str
    color: str = ""
    count: int = 1

    @property
    def noun(self) -> str:
        return f"{self.color} {self.shape}".lstrip()

    @property
    def entry(self) -> dict[str, Any]:
        """Of GenEval's metadata."""
        entry = {"class": self.shape, "count": self.count}
        return entry | {"color": self.color} if self.color else entry


@dataclass(frozen=True)
class Prompt:
    """What a picture is to show.

    Attributes:
        wanted: one to three objects of different shapes, all with a color, each its own, or none; or a count of one
            shape.
        relation: of the first object to the second, one of GenEval's; empty if any.

    Raises:
        InputError: no prompt of this grammar.
    """

    wanted: tuple[Wanted, ...]
    relation: str = ""

    def __post_init__(self) -> None:
        if reason := _objection(self):
            raise InputError(f"{reason}; {_EXAMPLES}")

    @property
    def tag(self) -> str:
        """GenEval's."""
        first = self.wanted[0]
        if self.relation:
            return POSITION
        if first.count > 1:
            return COUNTING
        if len(self.wanted) == 1:
            return COLOR if first.color else SINGLE
        return COLOR_ATTR if first.color else TWO

    @property
    def text(self) -> str:
        first = self.wanted[0]
        if first.count > 1:
            return f"{_PREFIX}{NUMBERS[first.count]} {plural(first.shape)}"
        *others, last = (with_article(wanted.noun) for wanted in self.wanted)
        if not others:
            return _PREFIX + last
        return f"{_PREFIX}{', '.join(others)} {self.relation or 'and'} {last}"

    @property
    def metadata(self) -> dict[str, Any]:
        """The line of GenEval's prompt file, in which the object with a position follows the one it refers to."""
        include = [wanted.entry for wanted in self.wanted]
        if self.relation:
            include = [include[1], include[0] | {"position": [self.relation, 0]}]
        metadata: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.tag == COUNTING:
            metadata["exclude"] = [{"class": self.wanted[0].shape, "count": self.wanted[0].count + 1}]
        return metadata | {"prompt": self.text}

    def canonical(self) -> Prompt:
        """The one of all wordings of the same content whose shapes are in the order of :data:`SHAPES`."""
        wanted = tuple(sorted(self.wanted, key=lambda one: SHAPES.index(one.shape)))
        return Prompt(wanted, self.relation if wanted == self.wanted else INVERSE.get(self.relation, ""))

    def wordings(self) -> list[Prompt]:
        """All prompts with the same content, this one first."""
        if self.relation:
            return [self, Prompt(self.wanted[::-1], INVERSE[self.relation])]
        return [Prompt(wanted) for wanted in permutations(self.wanted)]


def _objection(prompt: Prompt) -> str:
    """Why this is no prompt of the grammar; empty if it is one."""
    wanted, relation = prompt.wanted, prompt.relation
    shapes, colors = {one.shape for one in wanted}, [one.color for one in wanted if one.color]
    if not 1 <= len(wanted) <= MAX_OBJECTS:
        return f"{len(wanted)} objects"
    if unknown := [*shapes.difference(SHAPES), *set(colors).difference(COLORS)]:
        return f"unknown: {', '.join(map(repr, sorted(unknown)))}"
    if len(shapes) < len(wanted) or len(set(colors)) < len(colors):
        return "a shape or a color twice"
    if len(colors) not in (0, len(wanted)):
        return "a color for some objects only"
    if relation and (relation not in RELATIONS or len(wanted) != 2):
        return f"{relation!r} among {len(wanted)} objects"
    if any(one.count != 1 for one in wanted) and not (
        len(wanted) == 1 and not colors and 1 <= wanted[0].count <= MAX_COUNT
    ):
        return f"counts other than two to {NUMBERS[MAX_COUNT]} of one shape without a color"
    return ""


def from_metadata(metadata: Mapping[str, Any]) -> Prompt:
    """The prompt that a line of GenEval's format describes.

    Raises:
        InputError: it describes none of this grammar.
    """
    try:
        include = metadata["include"]
        wanted = tuple(Wanted(entry["class"], entry.get("color", ""), entry["count"]) for entry in include)
        relation = include[-1].get("position", ("",))[0]
        prompt = Prompt(wanted[::-1], relation) if relation else Prompt(wanted)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"metadata is not that of a GenEval prompt ({type(error).__name__}: {error})") from None
    for key in ("tag", "include", "exclude"):
        if metadata.get(key) != prompt.metadata.get(key):
            raise InputError(f"metadata with {key} {metadata.get(key)!r}: {prompt.metadata.get(key)!r} was expected")
    return prompt


def parse(text: str) -> Prompt:
    """The prompt that a text says; the inverse of :attr:`Prompt.text`, which may lack "a photo of".

    Raises:
        InputError: unknown words, which the message names, or no prompt of this grammar.
    """
    words = text.lower().replace(",", " , ").strip(" .\n").split()
    if unknown := [word for word in words if word not in _vocabulary()]:
        raise InputError(
            f"prompt {text!r}: unknown words: {', '.join(unknown)}. Shapes: {', '.join(SHAPES)}; "
            f"colors: {', '.join(COLORS)}; relations: {', '.join(RELATIONS)}; numbers: two to {NUMBERS[MAX_COUNT]}"
        )
    body = " ".join(words).removeprefix(_PREFIX)
    try:
        return _parse(body)
    except InputError as error:
        raise InputError(f"prompt {text!r}: {error}") from None


@cache
def _vocabulary() -> frozenset[str]:
    grammar = f"{_PREFIX} an and , {' '.join(RELATIONS)} {' '.join(NUMBERS[2 : MAX_COUNT + 1])}".split()
    return frozenset([*grammar, *COLORS, *SHAPES, *map(plural, SHAPES)])


def _parse(body: str) -> Prompt:
    number, _, rest = body.partition(" ")
    for shape in SHAPES:
        if rest == plural(shape) and number in NUMBERS:
            return Prompt((Wanted(shape, count=NUMBERS.index(number)),))
    relation = next((name for name in RELATIONS if f" {name} " in body), "")
    parts = body.split(f" {relation} ") if relation else re.split(r" , | and ", body)
    matches = [_ITEM.fullmatch(part) for part in parts]
    if not all(matches):
        raise InputError(f"not understood; {_EXAMPLES}")
    return Prompt(tuple(Wanted(match[2], match[1] or "") for match in matches if match), relation)


class _Form(NamedTuple):
    """Prompts of one tag that are built alike.

    Attributes:
        weight: how often training draws it.
        objects: of one prompt; 0 for a count of one shape.
    """

    tag: str
    weight: float
    objects: int
    colored: bool = False
    relations: tuple[str, ...] = ("",)


_FORMS = (
    _Form(SINGLE, 0.08, 1),
    _Form(TWO, 0.10, 2),
    _Form(TWO, 0.08, 3),
    _Form(COUNTING, 0.20, 0),
    _Form(COLOR, 0.09, 1, colored=True),
    _Form(POSITION, 0.11, 2, relations=RELATIONS),
    _Form(POSITION, 0.10, 2, colored=True, relations=RELATIONS),
    _Form(COLOR_ATTR, 0.14, 2, colored=True),
    _Form(COLOR_ATTR, 0.10, 3, colored=True),
)


def _contents(form: _Form) -> Iterator[Prompt]:
    """Every content of this form once, in its canonical wording."""
    if not form.objects:
        yield from (Prompt((Wanted(shape, count=n),)) for shape in SHAPES for n in range(2, MAX_COUNT + 1))
        return
    for shapes in combinations(SHAPES, form.objects):
        for colors in permutations(COLORS, form.objects) if form.colored else [("",) * form.objects]:
            wanted = tuple(map(Wanted, shapes, colors))
            yield from (Prompt(wanted, relation) for relation in form.relations)


def all_contents(tag: str) -> Iterator[Prompt]:
    """Every content of the prompts with this tag once, in its canonical wording."""
    for form in _FORMS:
        if form.tag == tag:
            yield from _contents(form)


def is_held_out(prompt: Prompt) -> bool:
    """Whether training must not use the prompt; the same for all its wordings.

    Held out are one count of each shape; two or three shapes, without colors or a relation, that include one of a
    quarter of all pairs; and, with all that implies them, two colors of each shape, one relation of each pair of
    shapes, and one in eight of the pairs of two colored shapes.
    """
    prompt = prompt.canonical()
    places = [SHAPES.index(one.shape) for one in prompt.wanted]
    first = prompt.wanted[0]
    if first.count > 1:
        return (first.count + places[0]) % (MAX_COUNT - 1) == 0
    colored = [(place, one) for place, one in zip(places, prompt.wanted, strict=True) if one.color]
    return (
        # 3 is coprime to 8, so that each color is held out with two shapes, too.
        any((_NAMES.index(one.color) - 3 * place) % len(COLORS) < 2 for place, one in colored)
        or (prompt.tag == TWO and any(_one_in(4, a, b) for a, b in combinations(prompt.wanted, 2)))
        or (bool(prompt.relation) and RELATIONS.index(prompt.relation) == (places[0] + 2 * places[1]) % len(RELATIONS))
        or any(_one_in(8, a, b) for (_, a), (_, b) in combinations(colored, 2))
    )


def _one_in(number: int, a: Wanted, b: Wanted) -> bool:
    """Whether the pair is one of a fixed ``number``-th of all."""
    return crc32(f"{a.noun}, {b.noun}".encode()) % number == 0


def held_out_prompts(count: int = 240, seed: int = 0) -> list[Prompt]:
    """Distinct prompts for a benchmark: the tags in turn, as long as each has any, and within a tag its forms in turn.

    Single objects are among them, though training uses them too. A content comes in a second wording only after
    all of its form have come in one.

    Raises:
        InputError: there are not so many.
    """
    by_tag = [_in_turn([_held_out_in(form, seed) for form in _FORMS if form.tag == tag]) for tag in TAGS]
    prompts = list(islice(_in_turn(by_tag), max(count, 0)))
    if not 0 < count == len(prompts):
        raise InputError(f"{count} held-out prompts were asked for: there are {len(prompts)}")
    return prompts


def _held_out_in(form: _Form, seed: int) -> Iterator[Prompt]:
    rng = Random(seed)
    contents = list(_contents(form))
    rng.shuffle(contents)
    wordings: list[list[Prompt]] = []
    for prompt in contents:
        if form.tag == SINGLE or is_held_out(prompt):
            several = prompt.wordings()
            rng.shuffle(several)
            wordings.append(several)
            yield several[0]
    for others in zip(*(several[1:] for several in wordings), strict=True):
        yield from others


def _in_turn(iterators: list[Iterator[Prompt]]) -> Iterator[Prompt]:
    return (prompt for row in zip_longest(*iterators) for prompt in row if prompt is not None)


def sample_prompt(rng: Random) -> Prompt:
    """A prompt for training."""
    form = rng.choices(_FORMS, _weights())[0]
    while True:
        if form.objects:
            shapes = rng.sample(SHAPES, form.objects)
            colors = rng.sample(_NAMES, form.objects) if form.colored else [""] * form.objects
            prompt = Prompt(tuple(map(Wanted, shapes, colors)), rng.choice(form.relations))
        else:
            prompt = Prompt((Wanted(rng.choice(SHAPES), count=rng.randint(2, MAX_COUNT)),))
        if not is_held_out(prompt):
            return prompt


@cache
def _weights() -> list[float]:
    return [form.weight for form in _FORMS]
