"""What can be trained, and what the loop of ``train.py`` needs to know of it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh

from rflow_jax.cli import nearest
from rflow_jax.errors import InputError
from rflow_jax.training.exporter import Exporter
from rflow_jax.training.update import Report, State

# The key ``task`` of a configuration -> (its dataclass, the class that is made of it and a mesh).
TASKS = {
    "corrector": ("rflow_jax.training.config:RunConfig", "rflow_jax.training.corrector:Corrector"),
    "reward": ("rflow_jax.training.reward.config:RewardRunConfig", "rflow_jax.training.reward.task:Reward"),
    "sft": ("rflow_jax.training.sft.config:SftRunConfig", "rflow_jax.training.sft.task:Sft"),
}
DEFAULT = "corrector"


@runtime_checkable
class Validation(Protocol):
    """Held-out records, tried every so many steps."""

    @property
    def every(self) -> int: ...

    def run(self, step: int, trainable: Any) -> dict[str, float]:
        """Losses and metrics of the parameters of one step, by name."""
        ...


@runtime_checkable
class Task(Protocol):
    """A model that is trained on data, loaded onto the mesh.

    Attributes:
        trained: what was trained, to be exported.
        trainable: the parameters that move, float32.
        flops: floating-point operations of a sample, forward and backward, without what is computed again.
        title: what is trained, in a few words.
    """

    @property
    def trained(self) -> Exporter: ...

    @property
    def trainable(self) -> Any: ...

    @property
    def flops(self) -> float: ...

    @property
    def title(self) -> str: ...

    def to_saved(self, state: State) -> State:
        """The state as checkpoints have it, whatever form a run computes with."""
        ...

    def to_running(self, state: State) -> State:
        """The state of a checkpoint as the step takes it; that given is used up."""
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

    def make_step(self, optimizer: Any, shardings: Any) -> TakeStep:
        """The compiled step; ``shardings`` are those of the state, which is donated."""
        ...

    def open_validation(self, out: Path) -> Validation | None:
        """Held-out records; None where the configuration names none."""
        ...


@runtime_checkable
class TakeStep(Protocol):
    """(state, what :meth:`Task.put` gives) -> (state, report)."""

    def __call__(self, state: State, inputs: Any, /) -> tuple[State, Report]: ...


def config_of(task: str) -> type:
    """The dataclass of a task's configuration.

    Raises:
        InputError: there is no such task.
    """
    if task not in TASKS:
        raise InputError(f"task is {task!r}: did you mean {nearest(task, TASKS)}? There are {', '.join(TASKS)}")
    return _named(TASKS[task][0])


def load_task(config: Any, mesh: Mesh) -> Task:
    """Loads what a configuration trains.

    Raises:
        InputError: the model or a setting is not usable.
    """
    return _named(TASKS[config.task][1])(config, mesh)


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
