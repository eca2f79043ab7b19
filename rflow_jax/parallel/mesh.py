"""The devices as a mesh of named axes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rflow_jax.parallel.layout import MeshConfig
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
