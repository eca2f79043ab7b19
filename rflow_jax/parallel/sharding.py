"""Sharding rules over parameter paths, outside the models.

Parameters are sharded over the mesh axes ``fsdp`` and ``sequence`` (gathered where they are used) and ``tensor`` (heads
and the width of the feed-forward part). The first rule whose pattern matches a path applies, and of its specs the
first that cuts the parameter on this mesh. A spec describes the *last* dimensions: the parameters of stacked blocks
have their layers in front, which are never cut, and the kernels of patches the pixels of a patch.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from rflow_jax.errors import InputError
from rflow_jax.models.partitioning import FSDP, SEQUENCE, TENSOR, Axes, dividing

Rules = Sequence[tuple[str, tuple[PartitionSpec, ...]]]
log = logging.getLogger(__name__)

# Devices that share the tokens of a sample also hold parts of the parameters, as those of ``fsdp`` do.
_PARTS = (FSDP, SEQUENCE)
_BOTH = (*_PARTS, TENSOR)
# Linears out of the heads or the wide part, cut by rows over ``tensor``; all others are cut by columns.
_BY_ROWS = r"(.*\.)?(out|down)"
_LORA_A = (PartitionSpec(_BOTH, None), PartitionSpec(None, _BOTH))
_LORA_B = (PartitionSpec(None, _BOTH), PartitionSpec(_BOTH, None))
# FLUX, text encoders, vision towers and language models by the same names. A LoRA is sharded as the kernel beside it.
# The specs after the first are for meshes of one axis and for sizes that it does not divide: the other axis, then the
# other dimension.
RULES: Rules = (
    # The autoencoder: small, whole everywhere.
    (r"(encoder|decoder|quant_conv|post_quant_conv)\..*", (PartitionSpec(),)),
    (rf"{_BY_ROWS}\.kernel", (PartitionSpec(TENSOR, _PARTS), PartitionSpec(None, _BOTH))),
    (rf"{_BY_ROWS}\.lora_a", (PartitionSpec(TENSOR, None), *_LORA_A)),
    (rf"{_BY_ROWS}\.lora_b", (PartitionSpec(None, _PARTS), *_LORA_B)),
    (r"(.*\.)?(patches|patch_in)\.kernel", (PartitionSpec(_BOTH),)),
    (r"(.*\.)?kernel", (PartitionSpec(_PARTS, TENSOR), PartitionSpec(_BOTH, None))),
    (r"(.*\.)?lora_a", (PartitionSpec(_PARTS, None), *_LORA_A)),
    (r"(.*\.)?lora_b", (PartitionSpec(None, TENSOR), *_LORA_B)),
    (r".*embedding", (PartitionSpec(None, _BOTH),)),
    (r".*", (PartitionSpec(),)),
)


class Whole(NamedTuple):
    """A parameter that every device holds completely."""

    path: str
    shape: tuple[int, ...]
    nbytes: int


def sharding_for(mesh: Mesh, rules: Rules = RULES) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(dotted path, shape) -> the sharding of that parameter on the mesh.

    Axes that the mesh lacks are dropped, and so are those that do not divide the parameter's; the latter is logged once
    for each parameter, since it costs memory.
    """

    @cache
    def choose(path: str, shape: tuple[int, ...]) -> NamedSharding:
        specs = next(specs for pattern, specs in rules if re.fullmatch(pattern, path))
        cutting = (spec for spec in specs if any(_fitted(spec, shape, mesh)))
        return NamedSharding(mesh, fit(next(cutting, specs[0]), path, shape, mesh))

    return choose


def put_by(choose: Callable[[str, tuple[int, ...]], Sharding | None]) -> Callable[[str, np.ndarray], jax.Array]:
    """(dotted path, array) -> the array with the sharding from ``choose``; every device gets only its own slice."""

    def put(path: str, value: np.ndarray) -> jax.Array:
        if (sharding := choose(path, value.shape)) is None:
            return jnp.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return put


def whole_parameters(
    choose: Callable[[str, tuple[int, ...]], Sharding],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Dtype = jnp.bfloat16,
) -> list[Whole]:
    """The parameters that stay whole on every device, largest first: memory that more devices do not save.

    Args:
        choose: as :func:`sharding_for` makes it.
        shapes: dotted path of each parameter -> its shape.
        dtype: of the parameters.
    """
    size = jnp.dtype(dtype).itemsize
    whole = (
        Whole(path, shape, size * math.prod(shape))
        for path, shape in shapes.items()
        if choose(path, shape).is_fully_replicated
    )
    return sorted(whole, key=lambda parameter: (-parameter.nbytes, parameter.path))


def fit(spec: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The part of a rule's spec that fits this mesh and this shape; logs the rest."""
    kept = _fitted(spec, shape, mesh)
    for size, wanted, axes in zip(shape, _aligned(spec, shape), kept, strict=True):
        for axis in wanted:
            if axis not in (axes or ()) and mesh.shape.get(axis, 1) > 1:
                count = mesh.shape[axis]
                log.warning("%s %s: axis %s of %d devices does not divide %d", path, shape, axis, count, size)
    return PartitionSpec(*(axes[0] if axes and len(axes) == 1 else axes for axes in kept))


def _fitted(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> list[Axes | None]:
    """For each dimension the axes of the spec that together divide it; None: whole."""
    sizes = dict(mesh.shape)
    return [dividing(axes, size, sizes) for size, axes in zip(shape, _aligned(spec, shape), strict=True)]


def _aligned(spec: PartitionSpec, shape: tuple[int, ...]) -> list[Axes]:
    """The axes that a spec names for each dimension, its last entry for the last one."""
    named = [() if axes is None else (axes,) if isinstance(axes, str) else tuple(axes) for axes in spec]
    return [*[()] * (len(shape) - len(named)), *named][max(0, len(named) - len(shape)) :]


def on_devices(numbers: Sequence[int] | None) -> Callable[[str, tuple[int, ...]], Sharding] | None:
    """(dotted path, shape) -> the sharding of that parameter.

    Args:
        numbers: of devices, as ``jax.local_devices()`` counts them: a model's heads and widths are cut over several.
            None: the first device, uncommitted.

    Raises:
        InputError: there is no such device, or it is named twice.
    """
    if numbers is None:
        return None
    devices = pick(numbers)
    if len(devices) == 1:
        single = SingleDeviceSharding(devices[0])
        return lambda path, shape: single
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
    """Makes the mesh of these parameters the ambient one (:mod:`rflow_jax.models.partitioning`), if they have one,
    while a program is called (and so traced) or lowered.

    Call only programs inside: an array made outside of them would belong to the mesh too.
    """
    shardings = (leaf.sharding for leaf in jax.tree.leaves(parameters))
    mesh = next((each.mesh.abstract_mesh for each in shardings if isinstance(each, NamedSharding)), None)
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def whole_beside(array: jax.Array) -> Sharding:
    """The sharding of a whole array that is used together with this one."""
    sharding = array.sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def unclaimed(claims: Sequence[Sequence[int]], devices: Sequence[Any] | None = None) -> list[Any]:
    """The devices that no model claims for itself; all of them if every one is claimed.

    Args:
        devices: to choose from; None: this process's.
    """
    devices = jax.local_devices() if devices is None else devices
    taken = {number for claim in claims for number in claim}
    return [device for number, device in enumerate(devices) if number not in taken] or list(devices)
