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
from rflow_jax.training.config import CorrectorRunConfig
from rflow_jax.training.corrector.latents import make_encode_latents, put_latents, require_latents_of
from rflow_jax.training.corrector.loss import Examples
from rflow_jax.training.corrector.step import ENCODERS, StepSpec, TokenShape, make_encode, make_step
from rflow_jax.training.corrector.validation import CorrectorValidation
from rflow_jax.training.partition import PartitionedModel, load_trainable_model
from rflow_jax.training.prefetch import put_pixels, slots_here
from rflow_jax.training.task import TrainStep
from rflow_jax.training.train_state import StepMetrics, TrainState


class Corrector:
    """A :class:`~rflow_jax.training.task.Task`.

    Raises:
        InputError: the model or a setting is not usable.
    """

    def __init__(self, config: CorrectorRunConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        options = {"seed": config.train.seed, "dtype": config.train.dtype, "scan_blocks": config.train.scan_blocks}
        self.model = load_trainable_model(config.model, config.lora, config.trainable_parameters, mesh=mesh, **options)
        self.trainable = self.model.trainable
        self.title = "a LoRA" if self.model.is_lora else "parameters"
        self._recipe = make_step_spec(config, self.model)
        self._put: Callable[[Any], Any]
        self._encode: Callable[[Any, Any], Examples]
        flux, recipe, data = self.model.bundle, self._recipe, config.data
        if data.format != "precomputed":
            self._put, self._encode = put_pixels(flux, recipe.shape.text, mesh), make_encode(flux, recipe, mesh)
            return
        require_latents_of(data.path, flux, recipe)
        if config.validation.path is None:
            for name in ENCODERS:  # no longer needed
                del flux.weights[name]
        self._put, self._encode = put_latents(mesh), make_encode_latents(flux, recipe, mesh)

    @property
    def exporter(self) -> PartitionedModel:
        """The exporter of a checkpoint's LoRA."""
        return self.model

    @property
    def flops(self) -> float:
        """FLOPs of a training sample: frozen weights get no gradient, only the activations that pass through them."""
        shape = self._recipe.shape
        (rows, columns), (c_rows, c_columns) = shape.image, shape.condition
        config = self.model.bundle.flux_config
        forward = forward_flops(config, text=shape.text, image=rows * columns, condition=c_rows * c_columns)
        return forward * (2 if self.model.is_lora else 3)

    def to_saved(self, state: TrainState) -> TrainState:
        """The state with parameters by block, whether or not the network stacks them."""
        return self.model.to_saved(state)

    def to_running(self, state: TrainState) -> TrainState:
        """The state of a checkpoint in the form of this run's network."""
        return self.model.to_running(state)

    def open_loader(self, start: int, position: Mapping[str, Any] | None) -> Loader:
        """Batches of GenRef from a step on."""
        seed, batch_size = self._config.train.seed, self._config.train.batch_size
        options = {"seed": seed, "batch_size": batch_size, "slots": slots_here(self._mesh, batch_size)}
        return open_loader(self._config.data, **options, start=start, position=position)

    def put(self, batch: Any) -> Any:
        """Images and tokens on the mesh, or latents."""
        return self._put(batch)

    def make_step(self, optimizer: Any, shardings: Any) -> TrainStep:
        """Encodes a batch, then updates the parameters."""
        trained, weights = self.model, self.model.bundle.weights
        step = make_step(trained.graph, optimizer, self._recipe, self._mesh, shardings)
        encode, encoders = self._encode, {name: weights[name] for name in ENCODERS if name in weights}

        def take(state: TrainState, inputs: Any) -> tuple[TrainState, StepMetrics]:
            return step(state, trained.frozen, encode(encoders, inputs), inputs.numbers)

        return take

    def open_validation(self, out: Path) -> CorrectorValidation | None:
        """Losses and images of held-out records."""
        config = self._config
        if config.validation.path is None:
            return None
        return CorrectorValidation(config.validation, config.data, self.model, self._recipe, self._mesh, out)


def make_step_spec(config: CorrectorRunConfig, trained: PartitionedModel) -> StepSpec:
    """The settings of a step, with sizes in the model's tokens.

    Raises:
        InputError: the images' sizes do not fit the model.
    """
    train, data, pixels = config.train, config.data, trained.bundle.token_pixels
    data.require_grid(pixels)
    image, condition = data.target_size // pixels, data.condition_size // pixels
    text = train.max_sequence_length or trained.bundle.defaults.max_sequence_length
    shape = TokenShape(text, (image, image), (condition, condition))
    dtype = jnp.dtype(train.dtype)
    parts = train.gradient_accumulation_steps
    return StepSpec(train.seed, dtype, shape, train.flags, train.remat, parts, train.attention)
