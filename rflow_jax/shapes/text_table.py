"""Tables of texts, prompts with and without reflections: as tokens, and as classes of all that they say."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.shapes.edits import MAX_SENTENCES, Edit, reflection, repair, spoil
from rflow_jax.shapes.grammar import (
    COLORS,
    MAX_OBJECTS,
    NUMBERS,
    SHAPES,
    TAGS,
    Prompt,
    all_contents,
    plural,
    sample_prompt,
)
from rflow_jax.shapes.requirements import remedies
from rflow_jax.shapes.scene_table import made_in_chunks
from rflow_jax.shapes.scenes import THING, make_scene
from rflow_jax.tokenizers.flux import Tokenizers, t5_prompt
from rflow_jax.typing import Array, Int
from rflow_jax.verifiers.geneval import RELATIONS

CHUNK = 2048  # texts that a worker makes at once
_OTHER, _THING = 0.25, 0.15  # how often a reflection is about a picture of another prompt, and of one with a thing
_DETAILED = 0.6  # how often it says what is there instead
_KEEP = "keep"
_SHAPE, _COLOR, _RELATION, _COUNT = ("", *SHAPES, THING), ("", *COLORS), ("", *RELATIONS), tuple(range(len(NUMBERS)))
_ACTION = ("", _KEEP, "color", "replace", "add", "remove", "move")
# What a text can say at each of its places: an object's color and shape, and so on; the first of each is nothing.
PROMPT_HEADS: tuple[tuple[str | int, ...], ...] = (_COLOR, _SHAPE) * MAX_OBJECTS + (_RELATION, _COUNT)
EDIT_HEADS: tuple[tuple[str | int, ...], ...] = (_ACTION, _COLOR, _SHAPE, _COLOR, _SHAPE, _RELATION, _COUNT)
HEADS = PROMPT_HEADS + EDIT_HEADS * MAX_SENTENCES
CLASSES = max(map(len, HEADS))  # of every head; some have no use for the last ones
OWN_HEADS = (_COLOR, _SHAPE)  # what the noun is that a token belongs to
_WORDS = re.compile(r"\[\w+\]|[a-z]+|[.,]")
_SINGULAR = {plural(shape): shape for shape in (*SHAPES, THING)} | {shape: shape for shape in (*SHAPES, THING)}


class Text(NamedTuple):
    """A prompt and what is said about a picture of it.

    Attributes:
        edits: of the reflection, none to keep everything; None: there is no reflection.
    """

    prompt: Prompt
    edits: tuple[Edit, ...] | None = None

    @property
    def t5(self) -> str:
        """What T5 reads; CLIP reads the prompt alone."""
        return t5_prompt(self.prompt.text, None if self.edits is None else reflection(self.edits))

    @property
    def content(self) -> list[str | int]:
        """What the text says at each place, a member of each of :data:`HEADS`: the objects as they are named."""
        wanted = [(one.color, one.shape) for one in self.prompt.wanted]
        said = [part for noun in (*wanted, *[("", "")] * (MAX_OBJECTS - len(wanted))) for part in noun]
        said += [self.prompt.relation, self.prompt.wanted[0].count]
        edits = [_content(edit) for edit in (self.edits or ())[:MAX_SENTENCES]]
        nothing = ("", "", "", "", "", "", 0)
        if self.edits == ():
            edits = [(_KEEP, *nothing[1:])]
        return said + [part for edit in (*edits, *[nothing] * (MAX_SENTENCES - len(edits))) for part in edit]

    @property
    def targets(self) -> list[int]:
        """The class of the content at each place."""
        return [head.index(part) for head, part in zip(HEADS, self.content, strict=True)]


def nouns_of(text: str) -> list[tuple[str, str]]:
    """For each of T5's tokens of a text, without its end, color and shape of the noun that it is a part of."""
    words = _WORDS.findall(text.lower())
    found = [(word if word in COLORS else "", _SINGULAR.get(word, "")) for word in words]
    for i, (_, shape) in enumerate(found):
        if shape and i and found[i - 1][0]:
            found[i - 1] = found[i] = (found[i - 1][0], shape)
    return found


def _content(edit: Edit) -> tuple[str | int, ...]:
    """A member of each of :data:`EDIT_HEADS`."""
    relation = next((one for one in RELATIONS if edit.to.startswith(one)), "")
    nouns = [noun.split() for noun in (edit.noun, edit.to)]
    parts = [next((word for word in noun if word in kind), "") for noun in nouns for kind in (_COLOR, _SHAPE)]
    return edit.action, *parts, relation, min(edit.count, len(NUMBERS) - 1)


@cache
def _all_contents() -> dict[str, list[Prompt]]:
    return {tag: list(all_contents(tag)) for tag in TAGS}


def sample_text(
    seed: int, number: int, *, reflected: float, kept: float, uniform: float, prompt: Prompt | None = None
) -> Text:
    """One text, which depends on these arguments only.

    Args:
        reflected, kept, uniform: shares as in :class:`~rflow_jax.shapes.text_config.TextDataConfig`.
        prompt: None: it is drawn too.
    """
    rng = Random(f"text {number} of {seed}")
    if prompt is None and rng.random() < uniform:
        prompt = rng.choice(rng.choice(_all_contents()[rng.choice(TAGS)]).wordings())
    prompt = prompt or sample_prompt(rng)
    if rng.random() >= reflected:
        return Text(prompt)
    if rng.random() < kept:
        return Text(prompt, ())
    if rng.random() < _OTHER:
        scene = make_scene(sample_prompt(rng), rng)
    else:
        scene = spoil(make_scene(prompt, rng), prompt, rng)
    if scene.items and rng.random() < _THING:
        items = list(scene.items)
        i = rng.randrange(len(items))
        items[i] = replace(items[i], shape=THING)
        scene = replace(scene, items=tuple(items))
    edits, _ = repair(prompt, scene, rng)
    return Text(prompt, edits if rng.random() < _DETAILED else remedies(prompt, scene))


class TextTable(NamedTuple):
    """Texts as tokens, padded, and as classes.

    Attributes:
        clip_ids: of the prompts.
        t5_ids: of the prompts and reflections.
        targets: for each of :data:`HEADS`.
        own: for each of T5's tokens and each of :data:`OWN_HEADS`; 0 where it belongs to no noun.
    """

    clip_ids: Int[Array | np.ndarray, "n c"]
    t5_ids: Int[Array | np.ndarray, "n t"]
    targets: Int[Array | np.ndarray, "n heads"]
    own: Int[Array | np.ndarray, "n t 2"]

    @property
    def fingerprint(self) -> str:
        """A hash of all texts."""
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).data for part in self)).hexdigest()[:16]


@dataclass(frozen=True)
class TextCoder:
    """Makes tables of texts with the tokens that generation makes of them.

    Attributes:
        model: the folder of the tokenizers.
        clip_length, t5_length: tokens that each network takes, padding included.
    """

    model: Path
    clip_length: int
    t5_length: int

    def __call__(self, texts: Sequence[Text]) -> TextTable:
        """The table of these texts; raises InputError if they are longer than the networks take."""
        tokenizers = load_tokenizers(self.model)
        prompts, whole = [text.prompt.text for text in texts], [text.t5 for text in texts]
        longest = [max(several, key=lambda text: len(text.split())) for several in (prompts, whole)]
        clip, t5 = tokenizers.lengths(longest)
        if clip[0] > self.clip_length or t5[1] > self.t5_length:
            raise InputError(
                f"{self.model}: takes {self.clip_length} CLIP tokens and {self.t5_length} T5 tokens; a prompt has "
                f"{clip[0]}, one with a reflection {t5[1]}"
            )
        own = np.zeros((len(texts), self.t5_length, len(OWN_HEADS)), np.int32)
        for row, text in zip(own, whole, strict=True):
            nouns = nouns_of(text)
            row[: len(nouns)] = [(_COLOR.index(color), _SHAPE.index(shape)) for color, shape in nouns]
        targets = np.asarray([text.targets for text in texts], np.int32)
        ids = tokenizers.clip(prompts, self.clip_length), tokenizers.t5(whole, self.t5_length)
        return TextTable(*ids, targets, own)


@cache
def load_tokenizers(model: Path) -> Tokenizers:
    """The tokenizers of a model, read once in each process."""
    return Tokenizers(model)


@dataclass(frozen=True)
class TextMaker:
    """Makes the texts of these numbers; runs in a worker. The arguments are those of :func:`sample_text`."""

    coder: TextCoder
    seed: int
    reflected: float
    kept: float
    uniform: float

    def __call__(self, numbers: range) -> TextTable:
        shares = {"reflected": self.reflected, "kept": self.kept, "uniform": self.uniform}
        return self.coder([sample_text(self.seed, number, prompt=None, **shares) for number in numbers])


def make_text_table(
    count: int,
    seed: int,
    coder: TextCoder,
    *,
    reflected: float,
    kept: float,
    uniform: float,
    workers: int | None = None,
) -> TextTable:
    """The first ``count`` texts of a seed, the same with any number of workers.

    Args:
        reflected, kept, uniform: as in :func:`sample_text`.
        workers: processes; None: all cores but one, and none for a small table. 0 uses this process.

    Raises:
        InputError: texts that are longer than the networks take.
    """
    made = made_in_chunks(TextMaker(coder, seed, reflected, kept, uniform), count, workers)
    return TextTable(*(np.concatenate(parts) for parts in zip(*made, strict=True)))
