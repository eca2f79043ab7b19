"""A program to be compiled ahead of time, and what is known of it beside the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding


@dataclass(frozen=True)
class AheadProgram:
    """One compiled program of a training run, a search or a verifier.

    Attributes:
        name: such as ``step`` or ``sample``.
        lower: traces it, with shapes in place of arrays.
        devices: how many it runs on.
        resident_bytes: on each device beside its arguments while it runs: other models, batches to come.
        flops: operations by formula, of all devices together: XLA counts a loop's body once and kernels not at all.
        hbm_bytes: through a chip's memory by formula (:mod:`rflow_jax.aot.estimate`); 0 where there is no formula.
        whole: (dotted path, bytes) of the parameters that every device holds all of, largest first.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    devices: int
    resident_bytes: int = 0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    whole: list[tuple[str, int]] = field(default_factory=list)


def shaped(shape: Iterable[int], dtype: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """The stand-in for an array."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def bytes_on_a_device(tree: Any) -> int:
    """What the arrays of a tree, or their stand-ins, take on the device that holds most of it."""

    def nbytes(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        itemsize = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
        return int(np.prod(shape, dtype=np.int64)) * itemsize

    return sum(map(nbytes, jax.tree.leaves(tree)))
