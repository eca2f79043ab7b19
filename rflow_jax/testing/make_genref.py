"""Small valid shards of GenRef with generated pictures: ``rflow data genref OUT``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageDraw

from rflow_jax.data.records import SUBSETS, Record
from rflow_jax.data.shard_writer import write_shard
from rflow_jax.utils.cli import Command
from rflow_jax.utils.ranges import Count, Range, Seed, require_ranges

FREQUENCIES = {"natural": (0.14, 0.09, 0.18, 0.59), "equal": (0.25,) * 4}  # GenRef's own, in the order of SUBSETS
COLORS = {"red": "#d33030", "green": "#2f9e44", "blue": "#3050d0", "yellow": "#f0c020", "purple": "#8038b0"}
SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class GenRefConfig:
    """Generated shards of GenRef.

    Attributes:
        out: folder of the shards, 000.tar and so on.
        shards: how many.
        samples: in each shard.
        size: pixels a side.
        seed: the same seed gives the same bytes.
        frequencies: of the subsets: ``natural`` as in GenRef, or ``equal``.
    """

    out: str
    shards: Count = 2
    samples: Count = 16
    size: Annotated[int, Range(8, 2**14)] = 64
    seed: Seed = 0
    frequencies: Literal["natural", "equal"] = "equal"

    def __post_init__(self) -> None:
        require_ranges(self)


def command(name: str, argv: Sequence[str]) -> Command:
    """The command; the folder may be given without its flag."""
    return Command((GenRefConfig,), _run, ("out",))


def make_genref(out: Path, **options: object) -> list[Path]:
    """Writes shards; the keywords are those of :class:`GenRefConfig`. Returns their paths."""
    config = GenRefConfig(str(out), **options)  # pyright: ignore[reportArgumentType]
    return [_write_shard(config, number) for number in range(config.shards)]


def _write_shard(config: GenRefConfig, shard: int) -> Path:
    path = Path(config.out) / f"{shard:03d}.tar"
    numbers = range(config.samples)
    write_shard(path, (_record(config, shard * config.samples + n, f"{shard:03d}_{n:05d}") for n in numbers))
    return path


def _record(config: GenRefConfig, number: int, key: str) -> Record:
    """The good picture shows what the prompt says, the bad one has the wrong colour; the reflection names it."""
    rng = np.random.default_rng([config.seed, number])
    equal = config.frequencies == "equal"
    subset = SUBSETS[number % len(SUBSETS)] if equal else rng.choice(SUBSETS, p=FREQUENCIES[config.frequencies])
    wanted, wrong = rng.choice(list(COLORS), 2, replace=False)
    shape = str(rng.choice(SHAPES))
    place, radius = rng.uniform(0.3, 0.7, 2), float(rng.uniform(0.15, 0.3))
    background = tuple(rng.integers(180, 256, 3).tolist())
    draw = (config.size, background, shape, (float(place[0]), float(place[1])), radius)
    return Record(
        key,
        str(subset),
        f"a {wanted} {shape}",
        f"The {shape} is {wrong}; make it {wanted}.",
        _picture(str(wanted), *draw),
        _picture(str(wrong), *draw),
    )


def _picture(
    color: str, size: int, background: tuple[int, ...], shape: str, place: tuple[float, float], radius: float
) -> bytes:
    image = Image.new("RGB", (size, size), background)
    x, y, r = place[0] * size, place[1] * size, radius * size
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), COLORS[color])
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), COLORS[color])
    else:
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], COLORS[color])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _run(config: GenRefConfig) -> None:
    paths = make_genref(Path(config.out), **{k: v for k, v in vars(config).items() if k != "out"})
    print(f"{len(paths)} shards of {config.samples} samples in {config.out}")
