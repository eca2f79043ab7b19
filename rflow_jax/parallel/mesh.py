"""The devices as a mesh of named axes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rflow_jax.errors import InputError
from rflow_jax.models.partitioning import DATA, FSDP
from rflow_jax.parallel.layout import REST, MeshConfig

BATCH = PartitionSpec((DATA, FSDP))  # samples lie along both: fsdp devices hold parts of parameters and own samples
# What mesh_utils raises if devices do not form the box that it expects, or axes do not fit into it.
_NO_FIT = (AssertionError, NotImplementedError, ValueError)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
log = logging.getLogger(__name__)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all processes, with neighbours close to each other in the network.

    Several TPU slices lie along ``data``, so that only the sum of gradients passes between them.

    Raises:
        InputError: the axes do not divide the devices, or the number of slices is wrong.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = _count_slices(config, devices)
    shape = replace(config, num_slices=slices).shape(len(devices))
    return Mesh(_grid(tuple(shape.values()), slices, devices), tuple(shape))


def mesh_of_first(config: MeshConfig) -> Mesh | None:
    """The mesh over the first devices of this process; None for one device.

    Raises:
        InputError: there are not enough devices.
    """
    sizes = [config.data, config.fsdp, config.sequence, config.tensor]
    devices = jax.local_devices()
    count = len(devices) if REST in sizes else math.prod(sizes)
    if count > len(devices):
        raise InputError(f"mesh: {count} devices are asked for, and this process has {len(devices)}")
    return None if count == 1 else make_mesh(config, devices[:count])


def traced_on(mesh: Mesh | None, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The function with this mesh as the ambient one, which a model reads while it is traced; see
    :mod:`rflow_jax.models.partitioning`. Without a mesh, the function itself.
    """
    if mesh is None:
        return function

    @wraps(function)
    def traced(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def samples_along(mesh: Mesh) -> int:
    """The number of parts of a batch."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def put_batch(mesh: Mesh, tree: Any, *, whole: bool = False) -> Any:
    """Rows on the host (numpy) -> arrays over the whole mesh, the first axis cut along the batch.

    Args:
        whole: every process passes all rows; otherwise each passes those of its own devices, in order.
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


def _count_slices(config: MeshConfig, devices: Sequence[Any]) -> int:
    """The number of slices along ``data``: the configured one, or else the actual one."""
    found = len({_slice_of(device) for device in devices})
    if config.num_slices == found:
        return found
    if config.num_slices > 1:
        raise InputError(
            f"mesh.num_slices is {config.num_slices}, but the devices are of {found} slice{'s' if found > 1 else ''}: "
            f"give {found}, or leave it out"
        )
    if devices[0].platform != "tpu":  # JAX counts every machine with GPUs as a slice, and NCCL joins them all
        return 1
    log.info("mesh: the devices are of %d TPU slices, which lie along axis %s", found, DATA)
    return found


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _grid(shape: tuple[int, ...], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """The devices in the mesh's shape.

    An axis made of whole axes of the physical network has their full bandwidth; only otherwise one of those is split.
    """
    within, between = (shape[0] // slices, *shape[1:]), (slices, *[1] * (len(shape) - 1))
    for split in (False, True):
        try:
            if slices == 1:
                return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
            return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=split)
        except _NO_FIT:
            continue
    sizes = " x ".join(map(str, shape))
    log.warning("mesh: %s does not map onto the network of the devices: they are taken in their order", sizes)
    grid = np.empty(len(devices), object)
    grid[:] = sorted(devices, key=_slice_of)
    return grid.reshape(shape)
