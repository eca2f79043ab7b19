"""Validation of the corrector: its loss and its images on held-out records."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import SUBSETS, Record, first_held_out
from rflow_jax.data.sources.open import open_source
from rflow_jax.data.transforms import Example, make_example
from rflow_jax.errors import InputError
from rflow_jax.flow import rope_for
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.generation.pipeline import NotFiniteError, Pipeline
from rflow_jax.parallel.mesh import put_batch, replicated, samples_along, traced_on
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.training.config import ValidationConfig
from rflow_jax.training.corrector.loss import Examples
from rflow_jax.training.corrector.step import ENCODERS, StepInputs, StepSpec, batch_losses, make_encode, sample_keys
from rflow_jax.training.partition import PartitionedModel
from rflow_jax.training.run_folder import fresh
from rflow_jax.typing import Array
from rflow_jax.utils.images import side_by_side
from rflow_jax.utils.secrets import public_addresses

FOLDER = "validation"
log = logging.getLogger(__name__)


class CorrectorValidation:
    """Held-out records, read and encoded once; each run evaluates the parameters of one step on them.

    Raises:
        InputError: the shards are not usable.
    """

    def __init__(
        self,
        config: ValidationConfig,
        data: DataConfig,
        trained: PartitionedModel,
        recipe: StepSpec,
        mesh: Mesh,
        out: Path,
    ):
        self.config, self.model, self.mesh, self.out = config, trained, mesh, out
        self._recipe = replace(recipe, seed=config.seed, remat="none", gradient_accumulation_steps=1)
        self.held_out = read_held_out(config, data)
        self._batches = list(self._encode())
        recipe, graph = self._recipe, trained.graph

        @partial(jax.jit, out_shardings=replicated(mesh))
        @partial(traced_on, mesh)
        def losses(trainable: nnx.State, frozen: nnx.State, examples: Examples, numbers: Array, t: Array) -> Array:
            rope = rope_for(graph.config, recipe.shape.text, recipe.shape.image, recipe.shape.condition)
            keys = sample_keys(recipe.seed, numbers)
            return batch_losses(graph.merge(trainable, frozen), recipe, rope, examples, keys, t)

        self._losses: Any = losses
        self._pipe = Pipeline(trained.bundle_with(trained.trainable), attention=recipe.attention)

    @property
    def every(self) -> int:
        """Steps between two runs."""
        return self.config.every

    def run(self, step: int, trainable: nnx.State) -> dict[str, float]:
        """Writes the images and returns the losses: ``validation/{subset}`` and ``validation/all``."""
        losses = self.losses(trainable)
        if self.config.pictures:
            self._write_images(step, trainable)
        return losses

    def losses(self, trainable: nnx.State) -> dict[str, float]:
        """The mean loss of each subset over records and times, and of all records."""
        found = np.zeros(len(self.held_out))
        for first, examples, numbers in self._batches:
            for time in self.config.times:
                t = put_batch(self.mesh, np.full(len(numbers), time, np.float32), whole=True)
                with reproducible(self._recipe.dtype):
                    losses = self._losses(trainable, self.model.frozen, examples, numbers, t)
                kept = found[first : first + len(numbers)]  # the last batch is padded
                kept += np.asarray(losses)[: len(kept)] / len(self.config.times)
        subsets = np.asarray([example.subset for _, example in self.held_out])
        means = {name: float(found[subsets == name].mean()) for name in SUBSETS if name in subsets}
        return {f"{FOLDER}/{name}": mean for name, mean in means.items()} | {f"{FOLDER}/all": float(found.mean())}

    def _encode(self) -> Iterator[tuple[int, Examples, Array]]:
        flux, size = self.model.bundle, samples_along(self.mesh)
        encode = make_encode(flux, self._recipe, self.mesh)
        encoders = {name: flux.weights[name] for name in ENCODERS}
        for first in range(0, len(self.held_out), size):
            numbers = np.minimum(np.arange(first, first + size), len(self.held_out) - 1).astype(np.uint32)
            chosen = [self.held_out[number][1] for number in numbers]
            host = (
                np.stack([example.good for example in chosen]),
                np.stack([example.bad for example in chosen]),
                flux.tokenizers.clip([example.prompt for example in chosen], flux.clip_length),
                flux.tokenizers.t5([example.t5_text for example in chosen], self._recipe.shape.text),
                numbers,
            )
            # Every process reads all records, and keeps the rows of its devices.
            inputs = StepInputs(*put_batch(self.mesh, host, whole=True))
            with reproducible(self._recipe.dtype):
                yield first, encode(encoders, inputs), inputs.numbers

    def _write_images(self, step: int, trainable: nnx.State) -> None:
        taken: Counter[str] = Counter()
        chosen: list[tuple[str, Record, Example]] = []
        for record, example in self.held_out:
            if taken[record.subset] < self.config.pictures:
                chosen.append((f"{record.subset}_{taken[record.subset]}.png", record, example))
                taken[record.subset] += 1
        recipe, pixels = self._recipe, self.model.bundle.token_pixels
        settings = SamplingConfig(
            height=recipe.shape.image[0] * pixels,
            width=recipe.shape.image[1] * pixels,
            condition_size=recipe.shape.condition[0] * pixels,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            max_sequence_length=recipe.shape.text,
            **asdict(recipe.flags),
        )
        images: dict[int, Image.Image] = {}
        try:
            self._pipe.with_weights(self.model.bundle_with(trainable).weights).generate(
                [record.prompt for _, record, _ in chosen],
                seeds=[(self.config.seed, i) for i in range(len(chosen))],
                conditions=[Image.fromarray(example.bad) for _, _, example in chosen],
                reflections=[record.reflection for _, record, _ in chosen],
                settings=settings,
                on_images=lambda first, made: images.update(enumerate(made, first)),
            )
        except NotFiniteError as error:
            log.warning("validation at step %d: %s", step, error)
        if jax.process_index():
            return
        folder = fresh(self.out / FOLDER / f"{step:07d}")
        folder.mkdir(parents=True)
        for place, image in images.items():
            name, _, example = chosen[place]
            side_by_side([Image.fromarray(example.bad), Image.fromarray(example.good), image]).save(folder / name)


def read_held_out(config: ValidationConfig, data: DataConfig) -> list[tuple[Record, Example]]:
    """The first usable records of each subset, cut from their centre and with nothing dropped.

    Raises:
        InputError: the shards are not usable.
    """
    assert config.path is not None
    nothing_dropped = {"drop_text_prob": 0.0, "drop_image_prob": 0.0, "drop_reflection_prob": 0.0}
    whole = replace(data, path=config.path, format=config.format, crop="center", **nothing_dropped)
    source = open_source(whole)

    def prepare(index: int, subset: str) -> tuple[Record, Example]:
        record = source.read(subset, index)
        return record, make_example(record, whole, seed=0, number=0)

    found: list[tuple[Record, Example]] = []
    for subset in SUBSETS:
        found += first_held_out(partial(prepare, subset=subset), source.counts.get(subset, 0), config.records)[0]
    if not found:
        raise InputError(f"validation.path: {public_addresses(config.path)} contains no usable record")
    return found
