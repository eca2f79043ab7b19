"""What tasks share whose samples are made on the devices from their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from jax.sharding import Mesh

from rflow_jax.parallel.mesh import put_batch
from rflow_jax.shapes.scene_table import NumberBatch, NumberLoader
from rflow_jax.training.config import CommonConfig
from rflow_jax.training.prefetch import slots_here
from rflow_jax.training.train_state import TrainState
from rflow_jax.typing import Array

Config = TypeVar("Config", bound=CommonConfig)


class NumberedTask(Generic[Config]):
    """The loader and the states of a :class:`~rflow_jax.training.task.Task`.

    Attributes:
        samples: what a sample is called.
    """

    samples: ClassVar[str]
    _config: Config
    _mesh: Mesh
    _fingerprint: str  # of what the samples are made from

    def to_saved(self, state: TrainState) -> TrainState:
        """The state as it is."""
        return state

    def to_running(self, state: TrainState) -> TrainState:
        """The state as it is."""
        return state

    def open_loader(self, start: int, position: Mapping[str, Any] | None) -> NumberLoader:
        """Numbers of samples from a step on."""
        size = self._config.train.batch_size
        options = {"batch_size": size, "slots": slots_here(self._mesh, size), "name": self.samples}
        return NumberLoader(start, **options, fingerprint=self._fingerprint, position=position)

    def put(self, batch: NumberBatch) -> Array:
        """The numbers on the mesh."""
        return put_batch(self._mesh, batch.numbers)
