"""Chats to train a checklist's model on: pictures of shapes, questions about them, and the true answers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from rflow_jax.data.sources.chats import PICTURE, chat_line
from rflow_jax.data.workers import Workers, worker_count
from rflow_jax.errors import InputError
from rflow_jax.shapes.drawn import CHUNK, DrawnPictures, PicturesConfig, draw_pictures
from rflow_jax.shapes.edits import spoil
from rflow_jax.shapes.grammar import COLORS, MAX_COUNT, SHAPES, Prompt, Wanted, sample_prompt, with_article
from rflow_jax.shapes.judge import read
from rflow_jax.shapes.render import render
from rflow_jax.shapes.requirements import CONTENT, sensible
from rflow_jax.shapes.scenes import THING, Scene, make_scene
from rflow_jax.utils.atomic_io import sync_tree, write_file
from rflow_jax.utils.images import png_bytes
from rflow_jax.utils.progress import count_progress
from rflow_jax.utils.ranges import Count, CountOrZero, PairCount
from rflow_jax.verifiers.geneval import RELATIONS

_TRIES = 30
_YES_OR_NO = ("no", "yes")
_KINDS = {"add": 0.35, "remove": 0.1, "color": 0.25, "move": 0.3}  # questions, by what a no would call for


@dataclass(frozen=True)
class QuestionsConfig(PicturesConfig):
    """Pictures, ``chats.jsonl`` and ``held_out.jsonl`` for ``task: sft``: yes/no questions about parts of prompts.

    Some pictures are the model's own; of the others half fail their prompts. A chat asks some questions
    and, at its end, what the picture shows: from yes and no alone a model hardly learns to see. The held-out chats are
    of one yes/no question each.

    Attributes:
        pictures: how many; each has one chat.
        drawn: how many of them the model draws.
        questions: yes/no questions about each picture.
        held_out: how many pictures' questions go into ``held_out.jsonl``.
    """

    pictures: PairCount = 24_000
    drawn: CountOrZero = 6_000
    questions: Count = 4
    held_out: Count = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drawn > self.pictures:
            raise InputError(f"drawn is {self.drawn}: give at most pictures ({self.pictures})")


class Asked(NamedTuple):
    """An encoded picture, yes/no questions about it with their answers, and what it shows."""

    picture: bytes
    questions: list[tuple[str, str]]
    content: str


@dataclass(frozen=True)
class QuestionMaker:
    """Makes pictures and questions; runs in a worker.

    Attributes:
        questions: about each picture.
    """

    seed: int
    questions: int

    def __call__(self, job: range | DrawnPictures) -> list[Asked]:
        """Of scenes with these numbers, or of these pictures."""
        if isinstance(job, DrawnPictures):
            return [
                self._asked(png_bytes(Image.fromarray(picture)), prompt, read(picture), rng)
                for prompt, picture, rng in job.cases()
            ]
        found = []
        for number in job:
            rng = Random(f"asked {number} of {self.seed}")
            prompt = sample_prompt(rng)
            scene = make_scene(prompt, rng)
            scene = spoil(scene, prompt, rng) if rng.random() < 0.5 else scene
            found.append(self._asked(png_bytes(render(scene)), prompt, scene, rng))
        return found

    def _asked(self, picture: bytes, prompt: Prompt, scene: Scene, rng: Random) -> Asked:
        asked = dict(ask(prompt, scene, rng) for _ in range(self.questions))  # none twice
        return Asked(picture, list(asked.items()), content(scene))


def content(scene: Scene) -> str:
    """What a scene shows, from left to right, and which are higher or lower than the one before."""
    shown = sorted(scene.items, key=lambda item: item.x)
    names = [with_article(f"{item.color} {item.shape}") for item in shown]
    heights = ["", *(" above" if item.y < before.y else " below" for before, item in pairwise(shown))]
    return ", ".join(name + height for name, height in zip(names, heights, strict=False)) or "nothing"


def ask(prompt: Prompt, scene: Scene, rng: Random) -> tuple[str, str]:
    """A question about a scene and its answer; of each kind, yes and no are about as frequent."""
    wanted, (kind,) = rng.random() < 0.5, rng.choices(list(_KINDS), list(_KINDS.values()))
    question, answer = "", False
    for _ in range(_TRIES):
        about = prompt if rng.random() < 0.5 else _similar(kind, scene, rng)
        parts = sensible(about, scene)
        part, answer = rng.choice([one for one in parts if one[0].remedy.action == kind] or parts)
        question = part.question
        if answer == wanted and part.remedy.action == kind:
            break
    return question, _YES_OR_NO[answer]


def _similar(kind: str, scene: Scene, rng: Random) -> Prompt:
    """A prompt about shapes that the scene shows, true or not; about any if it shows none."""
    shown = sorted({item.shape for item in scene.items} - {THING})
    first = rng.choice(shown or SHAPES)
    if kind == "move":
        second = rng.choice([shape for shape in (shown if len(shown) > 1 else SHAPES) if shape != first])
        return Prompt((Wanted(first), Wanted(second)), rng.choice(RELATIONS))
    if kind == "color":
        there = [item.color for item in scene.items if item.shape == first]
        return Prompt((Wanted(first, rng.choice([*there * 2, *COLORS])),))
    if kind == "add" and rng.random() < 0.5:
        return Prompt((Wanted(rng.choice(SHAPES)),))
    count = sum(item.shape == first for item in scene.items) + rng.choice((-1, 0, 0, 1))
    return Prompt((Wanted(first, count=min(max(count, 2), MAX_COUNT)),))


def write_questions(config: QuestionsConfig) -> tuple[int, int]:
    """Writes the pictures and, last, the two files; returns how many chats are in each.

    Raises:
        InputError: the folder holds something, or the model cannot be loaded.
    """
    out = config.new_folder()
    asked: list[Asked] = []  # without the pictures
    with Workers(QuestionMaker(config.seed, config.questions), worker_count(config.workers)) as workers:
        total = config.pictures - config.drawn
        jobs = [workers.submit(range(start, min(start + CHUNK, total))) for start in range(0, total, CHUNK)]
        jobs += [workers.submit(job) for job in draw_pictures(config, config.drawn)] if config.drawn else []
        with count_progress() as bar:
            task = bar.add_task("asking about pictures", total=config.pictures)
            while jobs:
                for one in jobs.pop(0).result()[: config.pictures - len(asked)]:
                    path = out / _picture_name(len(asked))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(one.picture)
                    asked.append(one._replace(picture=b""))
                bar.update(task, completed=len(asked))
    sync_tree(out)
    order = np.random.default_rng(config.seed).permutation(len(asked)).tolist()
    training = [_chat(asked[number], _picture_name(number)) for number in order[config.held_out :]]
    tests = [
        line for number in order[: config.held_out] for line in _single_chats(asked[number], _picture_name(number))
    ]
    write_file(out / "chats.jsonl", "".join(training))
    write_file(out / "held_out.jsonl", "".join(tests))
    return len(training), len(tests)


def _picture_name(number: int) -> str:
    return f"pictures/{number // 1000:03d}/{number:06d}.png"


def _chat(asked: Asked, picture: str) -> str:
    """A chat about a picture, as a JSON line."""
    (first, answer), *others = [*asked.questions, (CONTENT, asked.content)]
    return chat_line([(PICTURE + first, answer), *others], picture)


def _single_chats(asked: Asked, picture: str) -> list[str]:
    """Chats of one question each."""
    return [chat_line([(PICTURE + question, answer)], picture) for question, answer in asked.questions]
