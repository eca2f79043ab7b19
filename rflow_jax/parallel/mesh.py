"""The devices as a mesh of named axes, and the processes that drive them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rflow_jax.errors import InputError
from rflow_jax.parallel.sharding import DATA, FSDP, TENSOR

BATCH = PartitionSpec((DATA, FSDP))  # samples lie along both: fsdp devices hold parts of parameters and own samples
REST = -1


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; -1 for one of them takes what the others leave.

    Attributes:
        data: copies of the parameters, each with samples of its own.
        fsdp: parameters are cut in so many parts and gathered where they are used; samples are spread too.
        tensor: heads and the wide part of the feed-forward layers are cut in so many parts.
    """

    data: int = REST
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = {DATA: self.data, FSDP: self.fsdp, TENSOR: self.tensor}
        for axis, size in sizes.items():
            if size < 1 and size != REST:
                raise InputError(f"mesh.{axis} is {size}: give a number of devices, or -1 for the rest")
        if list(sizes.values()).count(REST) > 1:
            raise InputError("mesh: only one axis can take the rest (-1)")

    def shape(self, devices: int) -> dict[str, int]:
        """Axis -> size for so many devices.

        Raises:
            InputError: they cannot be divided so.
        """
        sizes = {DATA: self.data, FSDP: self.fsdp, TENSOR: self.tensor}
        fixed = int(np.prod([size for size in sizes.values() if size != REST]))
        filled = {axis: devices // fixed if size == REST else size for axis, size in sizes.items()}
        if int(np.prod(list(filled.values()))) != devices:
            asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise InputError(f"mesh: {asked} does not divide {devices} device{'s' if devices > 1 else ''}")
        return filled


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    shape = config.shape(len(devices))
    grid = mesh_utils.create_device_mesh(tuple(shape.values()), devices=devices)
    return Mesh(grid, tuple(shape))


def samples_along(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def put_batch(mesh: Mesh, tree: Any, *, whole: bool = False) -> Any:
    """Rows on the host (numpy) -> arrays over the whole mesh, the first axis cut along the batch.

    Args:
        whole: every process has all rows; else each has those of its own devices, in order.
    """
    sharding = NamedSharding(mesh, BATCH)

    def put(rows: np.ndarray) -> jax.Array:
        if whole:
            return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
        return jax.make_array_from_process_local_data(sharding, rows)

    return jax.tree.map(lambda rows: put(np.asarray(rows)), tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run; each is started with the same command.

    Attributes:
        enabled: on Cloud TPU, SLURM and Open MPI the rest is found out by itself.
        coordinator: host:port of process 0, where it is not.
        num_processes: how many there are.
        process_id: which of them this is.
    """

    enabled: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def start_processes(config: DistributedConfig) -> None:
    """Joins the other processes; before anything else asks JAX for its devices.

    Raises:
        InputError: they cannot be found.
    """
    if not config.enabled:
        return
    try:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"distributed: cannot join the other processes ({error}); give distributed.coordinator, num_processes and "
            "process_id"
        ) from error
