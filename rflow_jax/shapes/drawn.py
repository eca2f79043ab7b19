"""Pictures that a model of the shapes world draws of the prompts that training may use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.shapes.grammar import Prompt, sample_prompt
from rflow_jax.utils.checks import require_dtype
from rflow_jax.utils.ranges import BatchSize, DenoisingSteps, Seed, Workers, require_ranges

CHUNK = 512  # drawn scenes of one job


@dataclass(frozen=True)
class PicturesConfig:
    """What the commands share that make training data of a model's own pictures.

    Attributes:
        out: folder to write; must not contain anything.
        model: draws the pictures.
        seed: the same seed, model and hardware give the same data.
        num_inference_steps: denoising steps of a picture; null: the model's own.
        batch_size: pictures denoised together.
        dtype: of the model's weights and activations.
        workers: processes that judge and draw; null: one a core but one. 0 works in the run's own process.
    """

    out: str
    model: str = "shapes"
    seed: Seed = 0
    num_inference_steps: DenoisingSteps | None = None
    batch_size: BatchSize = 512
    dtype: str = "bfloat16"
    workers: Workers | None = None

    def __post_init__(self) -> None:
        require_ranges(self)
        require_dtype(self.dtype)

    def new_folder(self) -> Path:
        """The folder to write; raises InputError if it contains anything."""
        out = Path(self.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: contains something; name a new folder")
        return out


@dataclass(frozen=True)
class DrawnPictures:
    """Pictures that a model drew of these prompts, uint8 [pictures, 96, 96, 3].

    Attributes:
        first: the number of the first one.
    """

    seed: int
    first: int
    prompts: Sequence[Prompt]
    pictures: np.ndarray

    def cases(self) -> Iterator[tuple[Prompt, np.ndarray, Random]]:
        """Each prompt and its picture, with random numbers of its own."""
        for number, (prompt, picture) in enumerate(zip(self.prompts, self.pictures, strict=True), self.first):
            yield prompt, picture, Random(f"judged {number} of {self.seed}")


def draw_pictures(config: PicturesConfig, limit: int) -> Iterator[DrawnPictures]:
    """At least ``limit`` pictures, batch by batch; raises InputError if the model cannot be loaded."""
    from rflow_jax.generation.config import SamplingConfig
    from rflow_jax.generation.pipeline import load_pipeline

    pipe = load_pipeline(config.model, dtype=config.dtype)
    settings = SamplingConfig(num_inference_steps=config.num_inference_steps, batch_size=config.batch_size)
    for first in range(0, limit, config.batch_size):
        numbers = range(first, first + config.batch_size)
        rngs = [Random(f"generated {number} of {config.seed}") for number in numbers]
        prompts = [rng.choice(sample_prompt(rng).wordings()) for rng in rngs]
        seeds = [(config.seed, number) for number in numbers]
        images = pipe.generate([prompt.text for prompt in prompts], seeds=seeds, settings=settings)
        yield DrawnPictures(config.seed, first, prompts, np.stack([np.asarray(image) for image in images]))
