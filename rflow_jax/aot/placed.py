"""Shapes with a place on a mesh, as the real parameters and states have theirs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rflow_jax.aot.program import shaped
from rflow_jax.parallel.mesh import replicated
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.training.update import State, state_shardings


def on_mesh(state: Any, mesh: Mesh) -> Any:
    """Shapes with the places that the rules give them; a kernel's scales lie as its outputs do."""
    choose = sharding_for(mesh)

    def placed(path: Any, variable: Any) -> Any:
        first, *_ = jax.tree.leaves(variable.get_value())
        where = choose(".".join(map(str, path)), first.shape)
        return variable.replace(jax.tree.map(lambda leaf: _lying(leaf, where), variable.get_value()))

    return nnx.from_flat_state([(path, placed(path, variable)) for path, variable in nnx.to_flat_state(state)])


def whole_in(state: Any) -> list[tuple[str, int]]:
    """(dotted path, bytes) of the parameters of which each of several devices holds all, largest first."""
    found: dict[str, int] = {}
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        for leaf in jax.tree.leaves(variable.get_value()):
            if leaf.sharding.is_fully_replicated and leaf.sharding.num_devices > 1:
                found[name] = found.get(name, 0) + int(leaf.size) * jnp.dtype(leaf.dtype).itemsize
    return sorted(found.items(), key=lambda one: -one[1])


def _lying(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    axes = [*where.spec, *[None] * (leaf.ndim - len(where.spec))][: leaf.ndim]
    spec = PartitionSpec(*(axis if size > 1 else None for axis, size in zip(axes, leaf.shape, strict=True)))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(where.mesh, spec))


def abstract_state(trainable: Any, optimizer: Any, mesh: Mesh) -> tuple[State, State]:
    """As :func:`rflow_jax.training.update.init_state`, of shapes."""
    shardings = state_shardings(trainable, optimizer, mesh)
    made = jax.eval_shape(optimizer.init, trainable)
    moved = jax.tree.map(lambda x, place: shaped(x.shape, x.dtype, place), made, shardings.optimizer)
    step: Any = shaped((), jnp.int32, replicated(mesh))
    return State(step, trainable, moved), shardings
