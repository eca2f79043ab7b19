"""Chats to train a checklist's model on: pictures of shapes, questions about them, and the true answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from rflow_jax.data.sources.chats import PICTURE, chat_line
from rflow_jax.data.workers import Workers, worker_count
from rflow_jax.shapes.drawn import CHUNK, DrawnPictures, PicturesConfig, draw_pictures
from rflow_jax.shapes.edits import spoil
from rflow_jax.shapes.grammar import COLORS, MAX_COUNT, SHAPES, Prompt, Wanted, sample_prompt
from rflow_jax.shapes.judge import read
from rflow_jax.shapes.render import render
from rflow_jax.shapes.requirements import sensible
from rflow_jax.shapes.scenes import THING, Scene, make_scene
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.checks import require_least
from rflow_jax.utils.images import png_bytes
from rflow_jax.utils.progress import count_progress
from rflow_jax.verifiers.geneval import RELATIONS

_TRIES = 30
_YES_OR_NO = ("no", "yes")


@dataclass(frozen=True)
class QuestionsConfig(PicturesConfig):
    """Pictures, ``chats.jsonl`` and ``held_out.jsonl`` for ``task: sft``: yes/no questions about parts of prompts.

    A quarter of the pictures are the model's own; of the others half fail their prompts.

    Attributes:
        pictures: how many.
        questions: about each picture.
        held_out: how many pictures' questions go into ``held_out.jsonl``.
    """

    pictures: int = 40_000
    questions: int = 4
    held_out: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, "", pictures=2, questions=1, held_out=1)


class Asked(NamedTuple):
    """An encoded picture, and questions about it with their answers."""

    picture: bytes
    chats: list[tuple[str, str]]


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
                Asked(png_bytes(Image.fromarray(picture)), self._ask(prompt, read(picture), rng))
                for prompt, picture, rng in job.cases()
            ]
        found = []
        for number in job:
            rng = Random(f"asked {number} of {self.seed}")
            prompt = sample_prompt(rng)
            scene = make_scene(prompt, rng)
            scene = spoil(scene, prompt, rng) if rng.random() < 0.5 else scene
            found.append(Asked(png_bytes(render(scene)), self._ask(prompt, scene, rng)))
        return found

    def _ask(self, prompt: Prompt, scene: Scene, rng: Random) -> list[tuple[str, str]]:
        return [ask(prompt, scene, rng) for _ in range(self.questions)]


def ask(prompt: Prompt, scene: Scene, rng: Random) -> tuple[str, str]:
    """A question about a scene and its answer; yes and no are about as frequent."""
    wanted = rng.random() < 0.5
    question, answer = "", False
    for _ in range(_TRIES):
        about = prompt if rng.random() < 0.5 else _similar(scene, rng)
        part, answer = rng.choice(sensible(about, scene))
        question = part.question
        if answer == wanted:
            break
    return question, _YES_OR_NO[answer]


def _similar(scene: Scene, rng: Random) -> Prompt:
    """A prompt about shapes that the scene shows, true or not; about any if it shows none."""
    shown = sorted({item.shape for item in scene.items} - {THING})
    first = rng.choice(shown or SHAPES)
    second = rng.choice([shape for shape in (shown if len(shown) > 1 else SHAPES) if shape != first])
    match rng.randrange(4):
        case 0:
            return Prompt((Wanted(rng.choice(SHAPES)),))
        case 1:
            there = [item.color for item in scene.items if item.shape == first]
            return Prompt((Wanted(first, rng.choice([*there * 2, *COLORS])),))
        case 2:
            return Prompt((Wanted(first), Wanted(second)), rng.choice(RELATIONS))
    count = sum(item.shape == first for item in scene.items) + rng.choice((-1, 0, 0, 1))
    return Prompt((Wanted(first, count=min(max(count, 2), MAX_COUNT)),))


def write_questions(config: QuestionsConfig) -> tuple[int, int]:
    """Writes the pictures and the two files; returns how many chats are in each.

    Raises:
        InputError: the folder holds something, or the model cannot be loaded.
    """
    out, drawn = config.new_folder(), config.pictures // 4
    with Workers(QuestionMaker(config.seed, config.questions), worker_count(config.workers)) as workers:
        total = config.pictures - drawn
        jobs = [workers.submit(range(start, min(start + CHUNK, total))) for start in range(0, total, CHUNK)]
        jobs += [workers.submit(job) for job in draw_pictures(config, drawn)]
        with count_progress() as bar:
            task = bar.add_task("asking about pictures", total=config.pictures)
            asked: list[Asked] = []
            for job in jobs:
                asked += job.result()
                bar.update(task, completed=min(len(asked), config.pictures))
    asked = asked[: config.pictures]
    lines = [_lines(out, number, one) for number, one in enumerate(asked)]
    order = np.random.default_rng(config.seed).permutation(len(asked)).tolist()
    files = {"held_out.jsonl": order[: config.held_out], "chats.jsonl": order[config.held_out :]}
    counts = {}
    for name, numbers in files.items():
        chosen = [line for number in numbers for line in lines[number]]
        write_file(out / name, "".join(chosen))
        counts[name] = len(chosen)
    return counts["chats.jsonl"], counts["held_out.jsonl"]


def _lines(out: Path, number: int, asked: Asked) -> Sequence[str]:
    """Writes a picture; returns its chats as JSON lines."""
    name = f"pictures/{number // 1000:03d}/{number:06d}.png"
    write_file(out / name, asked.picture)
    return [chat_line(PICTURE + question, answer, name) for question, answer in asked.chats]
