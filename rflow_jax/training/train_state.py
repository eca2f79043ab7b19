"""One optimizer step of any objective, with gradient accumulation. Compiled over a mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from rflow_jax.parallel.mesh import BATCH, replicated, traced_on
from rflow_jax.typing import Array, Float, Int


class TrainState(NamedTuple):
    """What changes from step to step.

    Attributes:
        step: steps taken.
        trainable: parameters, float32.
        optimizer: the optimizer's state.
    """

    step: Int[Array, ""]
    trainable: Any
    optimizer: Any


class MeanMetric(NamedTuple):
    """A mean as a sum and its divisor, so that parts of a batch can be added up."""

    total: Float[Array, ""]
    of: Float[Array, ""]


Metrics = dict[str, MeanMetric]
# (trainable, frozen, batch) -> the loss, to be averaged over equal parts of a batch, and further metrics.
Objective = Callable[[Any, Any, Any], tuple[Float[Array, ""], Metrics]]


class StepMetrics(NamedTuple):
    """The numbers of a step.

    Attributes:
        gradient_norm: before the clip.
        d: Prodigy's estimate of the distance; None with other optimizers.
        metrics: of the objective, besides its loss.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    d: Float[Array, ""] | None
    metrics: Metrics = {}  # noqa: RUF012 (nothing is ever put into it)


def make_update(
    objective: Objective, optimizer: optax.GradientTransformation, *, gradient_accumulation_steps: int, mesh: Mesh
) -> Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]:
    """A function of (state, frozen parameters, batch), to be compiled by :func:`compile_step`.

    Args:
        gradient_accumulation_steps: number of parts of a batch, processed one after the other.
    """

    @partial(jax.shard_map, mesh=mesh, in_specs=BATCH, out_specs=PartitionSpec(None, *BATCH))
    def split(rows: Array) -> Array:
        """[b, ...] -> [parts, b / parts, ...], each device keeping its rows."""
        return rows.reshape(gradient_accumulation_steps, -1, *rows.shape[1:])

    def gradients(trainable: Any, frozen: Any, batch: Any) -> tuple[tuple[Array, Metrics], Any]:
        """Loss, metrics and gradient of the batch."""
        differentiate = jax.value_and_grad(objective, has_aux=True)
        if gradient_accumulation_steps == 1:
            return differentiate(trainable, frozen, batch)
        parts = jax.tree.map(split, batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, differentiate(trainable, frozen, part)), None

        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
        shapes = jax.eval_shape(differentiate, trainable, frozen, first)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        ((loss, metrics), gradient), _ = jax.lax.scan(add, zero, parts)
        loss, gradient = jax.tree.map(lambda x: x / gradient_accumulation_steps, (loss, gradient))
        return (loss, metrics), gradient

    def update(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, StepMetrics]:
        (loss, metrics), gradient = gradients(state.trainable, frozen, batch)
        updates, moved = optimizer.update(gradient, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        report = StepMetrics(loss, optax.tree.norm(gradient), optax.tree.get(moved, "estim_lr"), metrics)
        return TrainState(state.step + 1, trainable, moved), report

    return update


def compile_step(step: Callable[..., tuple[TrainState, StepMetrics]], shardings: Any, mesh: Mesh) -> Any:
    """Compiles a step; its first argument, the state, is donated and comes back with ``shardings``."""
    return jax.jit(traced_on(mesh, step), donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def init_state(trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, Any]:
    """The state before the first step, and its shardings."""
    shardings = state_shardings(trainable, optimizer, mesh)
    # Copied: Prodigy remembers the first parameters, and a donated buffer must not be in the state twice.
    init = jax.jit(lambda x: optimizer.init(jax.tree.map(jnp.copy, x)), out_shardings=shardings.optimizer)
    step = jnp.zeros((), jnp.int32, device=replicated(mesh))
    return TrainState(step, trainable, init(trainable)), shardings


def state_shardings(trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """The shardings of a state: an optimizer's numbers are sharded as their parameter.

    Args:
        trainable: arrays, or their shapes, with shardings.
    """
    parameters = jax.tree.map(lambda x: x.sharding, trainable)

    def is_masked(number: Any) -> bool:
        """An optimizer of several has none of its own for the others' parameters."""
        return isinstance(number, optax.MaskedNode)

    optimizer_shardings = optax.tree.map_params(
        optimizer,
        lambda number, sharding: number if is_masked(number) else sharding,
        jax.eval_shape(optimizer.init, trainable),
        parameters,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=is_masked,
    )
    step: Any = replicated(mesh)
    return TrainState(step, parameters, optimizer_shardings)
