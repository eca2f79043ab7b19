"""The corrector as a task: FLUX with a condition branch, trained on GenRef."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from rflow_jax.data.loader import Loader
from rflow_jax.data.sources.open import open_loader
from rflow_jax.models.flux.config import forward_flops
from rflow_jax.training.config import RunConfig
from rflow_jax.training.corrector.latents import make_encode_latents, put_latents, require_latents_of
from rflow_jax.training.corrector.loss import Examples
from rflow_jax.training.corrector.step import ENCODERS, StepSpec, TokenShape, make_encode, make_step
from rflow_jax.training.corrector.validation import Validation
from rflow_jax.training.partition import PartitionedModel, load_trainable_model
from rflow_jax.training.prefetch import put_pixels, slots_here
from rflow_jax.training.task import TrainStep
from rflow_jax.training.train_state import StepMetrics, TrainState


class Corrector:
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model or a setting is not usable.
    """

    def __init__(self, config: RunConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        how = config.train
        self.trained = load_trainable_model(
            *(config.model, config.trainable),
            seed=how.seed,
            dtype=how.dtype,
            mesh=mesh,
            scan_blocks=how.scan_blocks,
        )
        self.trainable = self.trained.trainable
        self.title = "a LoRA" if self.trained.is_lora else "parameters"
        self._recipe = make_step_spec(config, self.trained)
        self._put, self._encode = self._open_encoders()

    @property
    def flops(self) -> float:
        """Of frozen weights no gradient is computed, only that of what passes through them."""
        shape = self._recipe.shape
        (rows, columns), (c_rows, c_columns) = shape.image, shape.condition
        config = self.trained.bundle.flux_config
        forward = forward_flops(config, text=shape.text, image=rows * columns, condition=c_rows * c_columns)
        return forward * (2 if self.trained.is_lora else 3)

    def to_saved(self, state: TrainState) -> TrainState:
        """The state with parameters by block: the same whether blocks are stacked or not."""
        return self.trained.to_saved(state)

    def to_running(self, state: TrainState) -> TrainState:
        """The state of a checkpoint in the form of this run's network."""
        return self.trained.to_running(state)

    def open_loader(self, start: int, position: Mapping[str, Any] | None) -> Loader:
        """Batches of GenRef from a step on."""
        how = self._config.train
        slots = slots_here(self._mesh, how.batch_size)
        sizes = {"seed": how.seed, "batch_size": how.batch_size, "slots": slots}
        return open_loader(self._config.data, **sizes, start=start, position=position)

    def put(self, batch: Any) -> Any:
        """Pictures and tokens on the mesh, or latents."""
        return self._put(batch)

    def make_step(self, optimizer: Any, shardings: Any) -> TrainStep:
        """Encodes a batch, then moves the parameters."""
        trained, recipe, bundle = self.trained, self._recipe, self.trained.bundle
        step = make_step(trained.graph, optimizer, recipe, self._mesh, shardings)
        encode, encoders = self._encode, {name: bundle.weights[name] for name in ENCODERS if name in bundle.weights}

        def take(state: TrainState, inputs: Any) -> tuple[TrainState, StepMetrics]:
            return step(state, trained.frozen, encode(encoders, inputs), inputs.numbers)

        return take

    def _open_encoders(self) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Examples]]:
        """How a batch is put onto the mesh, and how it is encoded there."""
        config, bundle, recipe, mesh = self._config, self.trained.bundle, self._recipe, self._mesh
        if config.data.format != "precomputed":
            return put_pixels(bundle, recipe.shape.text, mesh), make_encode(bundle, recipe, mesh)
        require_latents_of(config.data.shards, bundle, recipe)
        if config.validation.shards is None:
            for name in ENCODERS:  # nothing asks them any more
                del bundle.weights[name]
        return put_latents(mesh), make_encode_latents(bundle, recipe, mesh)

    def open_validation(self, out: Path) -> Validation | None:
        """Losses and pictures of held-out records."""
        config = self._config
        if config.validation.shards is None:
            return None
        return Validation(config.validation, config.data, self.trained, self._recipe, self._mesh, out)


def make_step_spec(config: RunConfig, trained: PartitionedModel) -> StepSpec:
    """How a step is computed, the sizes in the model's own tokens.

    Raises:
        InputError: the pictures' sizes do not fit the model.
    """
    bundle, how, data = trained.bundle, config.train, config.data
    data.require_grid(bundle.token_pixels)
    image, condition = data.target_size // bundle.token_pixels, data.condition_size // bundle.token_pixels
    text = how.max_sequence_length or bundle.default_t5_length
    shape = TokenShape(text, (image, image), (condition, condition))
    dtype = jnp.dtype(how.dtype)
    return StepSpec(how.seed, dtype, shape, how.flags, how.remat, how.accumulation, how.attention)
