"""The devices as a mesh of named axes, and the processes that drive them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rflow_jax.errors import InputError
from rflow_jax.parallel.layout import DistributedConfig, MeshConfig
from rflow_jax.parallel.sharding import DATA, FSDP

BATCH = PartitionSpec((DATA, FSDP))  # samples lie along both: fsdp devices hold parts of parameters and own samples


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
