"""The interfaces of what can be trained, and of what the loop needs from it."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import optax
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.training.config import TASKS
from rflow_jax.training.train_state import StepMetrics, TrainState


@runtime_checkable
class Exporter(Protocol):
    """Exports the trained parameters in a form that other programs read.

    Attributes:
        exports: path of a step's export in the run's folder, ending in the step, such as ``lora/{step}``; None: there
            is no such form.
    """

    @property
    def exports(self) -> str | None: ...

    def export(self, trainable: nnx.State, folder: Path | None) -> None:
        """Called in every process, with a folder to make in the first process only."""
        ...


@runtime_checkable
class Validation(Protocol):
    """Evaluation on held-out records."""

    @property
    def every(self) -> int: ...

    def run(self, step: int, trainable: nnx.State) -> dict[str, float]:
        """Losses and metrics of the parameters of one step, by name."""
        ...


@runtime_checkable
class Task(Protocol):
    """A model that is trained on data, loaded onto the mesh.

    Attributes:
        exporter: of what was trained.
        trainable: the trained parameters, float32.
        flops: floating-point operations of a sample, forward and backward, without recomputation.
        title: what is trained, in a few words.
    """

    @property
    def exporter(self) -> Exporter: ...

    @property
    def trainable(self) -> Any: ...

    @property
    def flops(self) -> float: ...

    @property
    def title(self) -> str: ...

    def to_saved(self, state: TrainState) -> TrainState:
        """The state in the form of checkpoints."""
        ...

    def to_running(self, state: TrainState) -> TrainState:
        """The state of a checkpoint in the form that the step takes; the argument is donated."""
        ...

    def open_loader(self, start: int, position: Mapping[str, Any] | None) -> Any:
        """Batches from a step on, a :class:`~rflow_jax.data.loader.Loader`; ``position`` is that of a run that goes on.

        Raises:
            InputError: the data is not usable, or not that of the position.
        """
        ...

    def put(self, batch: Any) -> Any:
        """A batch of the loader as arrays on the mesh."""
        ...

    def make_step(self, optimizer: optax.GradientTransformation, shardings: Any) -> TrainStep:
        """The compiled step; ``shardings`` are those of the state, which is donated."""
        ...

    def open_validation(self, out: Path) -> Validation | None:
        """Held-out records; None if the configuration has none."""
        ...


@runtime_checkable
class TrainStep(Protocol):
    """(state, what :meth:`Task.put` gives) -> (state, report)."""

    def __call__(self, state: TrainState, inputs: Any, /) -> tuple[TrainState, StepMetrics]: ...


def load_task(config: Any, mesh: Mesh) -> Task:
    """Loads what a configuration trains.

    Raises:
        InputError: the model or a setting is not usable.
    """
    return pkgutil.resolve_name(TASKS[config.task][1])(config, mesh)
