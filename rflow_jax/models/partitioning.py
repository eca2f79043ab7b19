"""Shardings of a network's activations on a mesh: constrained where they are made, without a mesh in any signature.

The mesh is JAX's ambient one, which a program sets around what it traces
(:func:`rflow_jax.parallel.mesh.traced_on`). Without one everything here does nothing. Axes that a program maps over by
itself (``jax.shard_map``) are left alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from rflow_jax.typing import Array

DATA, FSDP, SEQUENCE, TENSOR = "data", "fsdp", "sequence", "tensor"
Axes = tuple[str, ...]
# Axes that the dimensions of an activation may be cut over.
BATCH: Axes = (DATA, FSDP)
TOKENS: Axes = (SEQUENCE,)
# Attention needs all tokens of a head on one device, so there the parts of a sequence are exchanged for heads.
HEADS: Axes = (TENSOR, SEQUENCE)
log = logging.getLogger(__name__)


def target_platform() -> str:
    """The platform compiled for: that of the ambient mesh's devices, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def auto_axes() -> dict[str, int]:
    """Axes of the ambient mesh that no enclosing ``shard_map`` maps over -> their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind == AxisType.Auto}


def has_axis(axis: str) -> bool:
    """Whether activations are cut along this axis."""
    return auto_axes().get(axis, 1) > 1


def constrain(x: Array, *dimensions: Axes | None) -> Array:
    """Constrains the sharding of an activation; the identity on one device.

    Args:
        dimensions: for each dimension of ``x`` the axes it is cut over, as far as they divide it; None: whole.
            Dimensions left out are whole.
    """
    axes = auto_axes()
    if math.prod(axes.values()) == 1:
        return x
    spec = PartitionSpec(*(dividing(wanted, size, axes) for wanted, size in zip(dimensions, x.shape, strict=False)))
    return jax.lax.with_sharding_constraint(x, spec)


def each_sample(function: Callable[[Any, Any], Array], shared: Any, arrays: Any, together: int = 1) -> Array:
    """``function(shared, sample)`` for one sample after another, to bound memory; on a mesh each device takes its own.

    Args:
        shared: the same for all samples, such as parameters.
        arrays: with samples first.
        together: samples that are computed at once.
    """
    axes = auto_axes()
    batch = dividing(BATCH, jax.tree.leaves(arrays)[0].shape[0], axes)

    def own(shared: Any, arrays: Any) -> Array:
        return jax.lax.map(partial(function, shared), arrays, batch_size=together if together > 1 else None)

    if batch is None:
        return own(shared, arrays)
    rows = PartitionSpec(batch)
    specs = (PartitionSpec(), rows)
    return jax.shard_map(own, in_specs=specs, out_specs=rows, axis_names=set(batch), check_vma=False)(shared, arrays)


def dividing(wanted: Axes | None, size: int, axes: dict[str, int], what: str | None = None) -> Axes | None:
    """Those of the wanted axes that together divide a dimension of this size; None if there are none.

    Args:
        axes: names and sizes of the axes there are.
        what: the dimension's name for a warning where an axis does not divide it; None: no warning.
    """
    kept: Axes = ()
    for axis in wanted or ():
        if axes.get(axis, 1) == 1:
            continue
        if size % math.prod(axes[name] for name in (*kept, axis)) == 0:
            kept += (axis,)
        elif what is not None:
            warn_once(f"mesh: {axes[axis]} devices of axis {axis} do not divide {size} {what}: each computes all")
    return kept or None


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """Logs a warning that a trace would repeat for every block."""
    log.warning(message)
