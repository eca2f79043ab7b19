"""Which of this process's devices a model takes, when several models share a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from rflow_jax.errors import InputError
from rflow_jax.models.partitioning import TENSOR
from rflow_jax.parallel.sharding import sharding_for


def on_devices(numbers: Sequence[int] | None) -> Callable[[str, tuple[int, ...]], Sharding] | None:
    """(dotted path, shape) -> where that parameter lives.

    Args:
        numbers: of devices, as ``jax.local_devices()`` counts them: a model's heads and widths are cut over several.
            None: the first device, uncommitted.

    Raises:
        InputError: no such device, or one named twice.
    """
    if numbers is None:
        return None
    devices = pick(numbers)
    if len(devices) == 1:
        where = SingleDeviceSharding(devices[0])
        return lambda path, shape: where
    return sharding_for(Mesh(np.array(devices), (TENSOR,)))


def pick(numbers: Sequence[int], devices: Sequence[Any] | None = None) -> list[Any]:
    """The devices of these numbers, among those given or this process's; raises as :func:`on_devices`."""
    devices = jax.local_devices() if devices is None else devices
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"devices: {list(numbers)}: name each device once, and at least one")
    if wrong := [number for number in numbers if not 0 <= number < len(devices)]:
        raise InputError(f"devices: there is no device {wrong[0]}: this process has {len(devices)}, counted from 0")
    return [devices[number] for number in numbers]


@contextmanager
def on_mesh_of(parameters: Any) -> Iterator[None]:
    """While a program of these parameters is called (and so traced) or lowered: the mesh that they lie on is the
    ambient one (:mod:`rflow_jax.models.partitioning`). For parameters that lie on no mesh it does nothing.

    Inside, only programs may be called: an array that is made outside of them would belong to the mesh too.
    """
    shardings = (leaf.sharding for leaf in jax.tree.leaves(parameters))
    mesh = next((where.mesh.abstract_mesh for where in shardings if isinstance(where, NamedSharding)), None)
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def whole_beside(array: jax.Array) -> Sharding:
    """Where all of an array can lie to be used together with this one."""
    there = array.sharding
    return NamedSharding(there.mesh, PartitionSpec()) if isinstance(there, NamedSharding) else there


def unclaimed(claims: Sequence[Sequence[int]], devices: Sequence[Any] | None = None) -> list[Any]:
    """The devices that no model claims for itself; all of them, where every one is claimed.

    Args:
        devices: to choose from; None: this process's.
    """
    devices = jax.local_devices() if devices is None else devices
    taken = {number for claim in claims for number in claim}
    return [device for number, device in enumerate(devices) if number not in taken] or list(devices)
