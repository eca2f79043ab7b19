"""Which device holds what: rules over parameter paths, outside the models.

Meshes have named axes out of ``data`` (samples), ``fsdp`` (parameters, gathered where they are used) and ``tensor``
(heads and the width of the feed-forward part). A rule gives a parameter's axes their mesh axes; the first rule that
matches counts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
Rules = Sequence[tuple[str, PartitionSpec]]
log = logging.getLogger(__name__)

# FLUX, text encoders and language models by the same names. Into heads or the wide part: columns over ``tensor``; back:
# rows.
RULES: Rules = (
    (r"(encoder|decoder|quant_conv|post_quant_conv)\..*", PartitionSpec()),  # the autoencoder: small, whole everywhere
    (r".*\.(q|k|v|up|gate|mlp|mod|head)\.kernel", PartitionSpec(FSDP, TENSOR)),
    (r".*\.(out|down)\.kernel", PartitionSpec(TENSOR, FSDP)),
    (r".*\.kernel", PartitionSpec(FSDP)),
    (r".*\.lora_a", PartitionSpec(FSDP)),
    (r".*\.lora_b", PartitionSpec(None, FSDP)),
    (r".*\.?embedding", PartitionSpec(None, FSDP)),
    (r".*", PartitionSpec()),
)


def sharding_for(mesh: Mesh, rules: Rules = RULES) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(dotted path, shape) -> where that parameter lives on the mesh.

    Axes that the mesh lacks are dropped, and so are those that do not divide the parameter's: that is logged once for
    each parameter, since it costs memory.
    """

    def choose(path: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next(spec for pattern, spec in rules if re.fullmatch(pattern, path))
        return NamedSharding(mesh, fit(spec, path, shape, mesh))

    return choose


def put_by(choose: Callable[[str, tuple[int, ...]], Sharding | None]) -> Callable[[str, np.ndarray], jax.Array]:
    """(dotted path, array) -> the array where ``choose`` says; every device gets its own slice and no other."""

    def put(path: str, value: np.ndarray) -> jax.Array:
        if (where := choose(path, value.shape)) is None:
            return jnp.asarray(value)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    return put


def fit(spec: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The part of a rule that this mesh and this shape can follow."""
    kept: list[str | None] = []
    for size, axis in zip(shape, (*spec, *[None] * len(shape)), strict=False):
        if axis is None or axis not in mesh.shape or mesh.shape[axis] == 1:
            kept.append(None)
        elif size % mesh.shape[axis]:
            log.warning("%s %s: axis %s of %d devices does not divide %d", path, shape, axis, mesh.shape[axis], size)
            kept.append(None)
        else:
            kept.append(axis)
    return PartitionSpec(*kept)
