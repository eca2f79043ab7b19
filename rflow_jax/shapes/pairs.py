"""GenRef's pairs in the world of shapes: a model's own mistakes, pictures to keep, and drawn scenes with edits."""

from __future__ import annotations

from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from rflow_jax.data.records import SUBSETS, Record
from rflow_jax.data.shard_writer import write_shard
from rflow_jax.data.workers import Workers, worker_count
from rflow_jax.errors import InputError
from rflow_jax.shapes.drawn import CHUNK, DrawnPictures, PicturesConfig, draw_pictures
from rflow_jax.shapes.edits import reflection, repair, spoil
from rflow_jax.shapes.grammar import Prompt, sample_prompt
from rflow_jax.shapes.judge import read
from rflow_jax.shapes.render import render
from rflow_jax.shapes.requirements import remedies
from rflow_jax.shapes.scenes import is_clear, judge_scene, make_scene
from rflow_jax.utils.images import png_bytes
from rflow_jax.utils.progress import count_progress
from rflow_jax.utils.ranges import Count
from rflow_jax.verifiers.findings import KEEP

GENERAL, LENGTH, RULE, EDITING = SUBSETS
SHARES = {GENERAL: 0.15, LENGTH: 0.15, RULE: 0.4, EDITING: 0.3}
_TIMES = 50  # so many pictures for each pair of a model's own pictures, at most


@dataclass(frozen=True)
class PairsOfShapesConfig(PicturesConfig):
    """GenRef for the world of shapes, in shards as GenRef's own.

    Its subsets: ``rule``, a picture that the model drew wrong and the same scene drawn right; ``general``, pictures to
    keep as they are; ``editing`` and ``length``, drawn scenes with one edit and with two.

    Attributes:
        records: how many pairs.
        shard: pairs of a shard, at most.
    """

    records: Count = 14_000
    shard: Count = 2048

    @property
    def counts(self) -> dict[str, int]:
        """Pairs of each subset."""
        found = {name: round(share * self.records) for name, share in SHARES.items()}
        found[RULE] += self.records - sum(found.values())
        return found


@dataclass(frozen=True)
class DrawJob:
    """Pairs of these numbers, of one subset, to be drawn."""

    seed: int
    subset: str
    numbers: range


def make_pairs(job: DrawJob | DrawnPictures) -> list[Record]:
    """The pairs of a job, without keys; of pictures only those of which one can be made."""
    if isinstance(job, DrawJob):
        make = _kept if job.subset == GENERAL else _edited
        return [make(job.subset, Random(f"{job.subset} pair {number} of {job.seed}")) for number in job.numbers]
    pairs = (_judged(*case) for case in job.cases())
    return [pair for pair in pairs if pair is not None]


def _kept(subset: str, rng: Random) -> Record:
    prompt = sample_prompt(rng)
    picture = png_bytes(render(make_scene(prompt, rng)))
    return Record("", subset, _text(prompt, rng), KEEP, picture, picture)


def _edited(subset: str, rng: Random) -> Record:
    number = 2 if subset == LENGTH else 1
    while True:
        prompt = sample_prompt(rng)
        bad = spoil(make_scene(prompt, rng), prompt, rng)
        edits, good = repair(prompt, bad, rng)
        if len(edits) == number and is_clear(good) and judge_scene(prompt, good).correct:
            said = reflection(edits if rng.random() < 0.5 else remedies(prompt, bad))
            return Record("", subset, _text(prompt, rng), said, *(png_bytes(render(scene)) for scene in (good, bad)))


def _judged(prompt: Prompt, picture: np.ndarray, rng: Random) -> Record | None:
    """A picture to keep, or one with the picture that a repair of what it shows gives; None if that cannot be drawn."""
    scene, encoded = read(picture), png_bytes(Image.fromarray(picture))
    if judge_scene(prompt, scene).correct:
        return Record("", GENERAL, prompt.text, KEEP, encoded, encoded)
    edits, good = repair(prompt, scene, rng)
    if not is_clear(good) or not judge_scene(prompt, good).correct:
        return None
    said = reflection(edits if rng.random() < 0.25 else remedies(prompt, scene))
    return Record("", RULE, prompt.text, said, png_bytes(render(good)), encoded)


def _text(prompt: Prompt, rng: Random) -> str:
    return rng.choice(prompt.wordings()).text


def write_pairs(config: PairsOfShapesConfig) -> dict[str, int]:
    """Writes the shards; returns the number of pairs of each subset.

    Raises:
        InputError: the folder holds something, or the model cannot be loaded or draws too few pictures that are right,
            or that are wrong.
    """
    out, wanted = config.new_folder(), config.counts
    judged = {RULE: wanted[RULE], GENERAL: wanted[GENERAL] // 2}
    drawn = {name: number - judged.get(name, 0) for name, number in wanted.items()}
    with Workers(make_pairs, worker_count(config.workers)) as workers, count_progress() as bar:
        jobs = [
            workers.submit(DrawJob(config.seed, name, range(start, min(start + CHUNK, total))))
            for name, total in drawn.items()
            for start in range(0, total, CHUNK)
        ]
        task = bar.add_task("making pairs", total=config.records)
        found = _of_pictures(config, judged, workers, lambda n: bar.advance(task, n))
        for job in jobs:
            found += (made := job.result())
            bar.advance(task, len(made))
    Random(config.seed).shuffle(found)
    for shard, first in enumerate(range(0, len(found), config.shard)):
        records = found[first : first + config.shard]
        keyed = (record._replace(key=f"{shard:03d}_{n:05d}") for n, record in enumerate(records))
        write_shard(out / f"{shard:03d}.tar", keyed)
    return dict(Counter(record.subset for record in found))


def _of_pictures(config: PairsOfShapesConfig, wanted: dict[str, int], workers: Workers, advance: Any) -> list[Record]:
    """So many pairs of each subset from a model's own pictures; while some are judged, the next are made."""
    found: list[Record] = []
    left = Counter(wanted)
    waiting: deque[Future[list[Record]]] = deque()

    def take() -> None:
        for record in waiting.popleft().result():
            if left[record.subset]:
                left[record.subset] -= 1
                found.append(record)
                advance(1)

    for job in draw_pictures(config, _TIMES * sum(wanted.values())):
        waiting.append(workers.submit(job))
        while waiting and (len(waiting) > 2 * worker_count(config.workers) or waiting[0].done()):
            take()
        if not left.total():
            return found
    while waiting:
        take()
    if left.total():
        short = [f"{wanted[name] - number} of {wanted[name]} {name}" for name, number in left.items() if number]
        raise InputError(f"{config.model}: its pictures gave only {' and '.join(short)} pairs; is it trained?")
    return found
