"""Shapes with shardings on a mesh, as real parameters and states have them, and the programs lowered from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rflow_jax.parallel.mesh import replicated
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.training.train_state import TrainState, state_shardings


def on_mesh(state: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings that the rules give them; a quantized kernel's scales are cut like its outputs."""
    choose = sharding_for(mesh)

    def placed(path: Any, variable: Any) -> Any:
        first, *_ = jax.tree.leaves(variable.get_value())
        sharding = choose(".".join(map(str, path)), first.shape)

        def on_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
            axes = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))][: leaf.ndim]
            spec = PartitionSpec(*(axis if size > 1 else None for axis, size in zip(axes, leaf.shape, strict=True)))
            return shaped(leaf.shape, leaf.dtype, NamedSharding(sharding.mesh, spec))

        return variable.replace(jax.tree.map(on_sharding, variable.get_value()))

    return nnx.from_flat_state([(path, placed(path, variable)) for path, variable in nnx.to_flat_state(state)])


def whole_in(state: Any) -> list[tuple[str, int]]:
    """(dotted path, bytes) of the parameters that are fully replicated over several devices, largest first."""
    found: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        for leaf in jax.tree.leaves(variable.get_value()):
            if leaf.sharding.is_fully_replicated and leaf.sharding.num_devices > 1:
                found[name] = found.get(name, 0) + int(leaf.size) * jnp.dtype(leaf.dtype).itemsize
    return sorted(found.items(), key=lambda one: -one[1])


def abstract_state(trainable: Any, optimizer: Any, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """The shapes of :func:`rflow_jax.training.train_state.init_state`, and their shardings."""
    shardings = state_shardings(trainable, optimizer, mesh)
    shapes = jax.eval_shape(optimizer.init, trainable)
    state = jax.tree.map(lambda x, sharding: shaped(x.shape, x.dtype, sharding), shapes, shardings.optimizer)
    step: Any = shaped((), jnp.int32, replicated(mesh))
    return TrainState(step, trainable, state), shardings


@dataclass(frozen=True)
class AheadProgram:
    """One compiled program of a training run, a search or a verifier.

    Attributes:
        name: such as ``step`` or ``sample``.
        lower: traces it, with shapes in place of arrays.
        devices: number of devices it runs on.
        resident_bytes: on each device beside its arguments while it runs: other models, batches to come.
        flops: operations by formula, of all devices together: XLA counts a loop's body once and kernels not at all.
        hbm_bytes: through a chip's memory by formula (:mod:`rflow_jax.aot.estimate`); 0 where there is no formula.
        whole: (dotted path, bytes) of the fully replicated parameters, largest first.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    devices: int
    resident_bytes: int = 0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    whole: list[tuple[str, int]] = field(default_factory=list)


def shaped(shape: Iterable[int], dtype: Dtype, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """The shape of an array, with its sharding."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def bytes_on_a_device(tree: Any) -> int:
    """Bytes that a tree's arrays, or their shapes, take on the device with most of them."""

    def nbytes(leaf: Any) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        itemsize = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
        return int(np.prod(shape, dtype=np.int64)) * itemsize

    return sum(map(nbytes, jax.tree.leaves(tree)))
