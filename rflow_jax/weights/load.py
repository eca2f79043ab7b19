"""Fills an abstract network from a checkpoint, one tensor at a time, straight into its place on the devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.tables import Plan, Table, Target, plan

Model = TypeVar("Model", bound=nnx.Module)
# Elements from which the transposition is worth a compiled program of its own.
TRANSPOSED_ON_DEVICE = 2**20
# (dotted path, shape) -> where the parameter is to live; None: the default device.
ShardingFor = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def parameter_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every ``nnx.Param`` that is no LoRA (abstract or concrete)."""
    return {path: tuple(variable.shape) for path, variable in _parameters(model)}


def parameter_values(model: nnx.Module) -> dict[str, Any]:
    """Dotted path -> value of every ``nnx.Param`` that is no LoRA."""
    return {path: variable[...] for path, variable in _parameters(model)}


def parameter_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Dotted path -> the variable of every ``nnx.Param`` that is no LoRA; setting it sets the model's."""
    return dict(_parameters(model))


def load_into(
    model: Model,
    table: Table,
    files: TensorFiles,
    *,
    dtype: Any = None,
    sharding_for: ShardingFor | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Model:
    """Reads a checkpoint into ``model`` (abstract, from ``nnx.eval_shape``) and returns it.

    Every tensor goes from the file to its devices and is transposed there; the host holds a bounded window of
    tensors and never the checkpoint.

    Args:
        dtype: of the parameters; None keeps the checkpoint's.
        sharding_for: where each parameter lives; None puts all on the default device.
        on_bytes: told of the bytes of each tensor when it is placed.

    Raises:
        InputError: keys or shapes that are not exactly the network's.
    """
    the_plan = plan(table, parameter_shapes(model))
    the_plan.check_files(files)
    variables = parameter_variables(model)
    arriving = Arriving()
    for target, rows in stream_targets(the_plan, files):
        value = place(target, rows, dtype, sharding_for(target.path, target.shape) if sharding_for else None)
        variables[target.path].set_value(value)
        arriving.add(value)
        if on_bytes:
            on_bytes(rows.nbytes)
    return model


class Arriving:
    """Arrays on their way to the devices, kept below a number of bytes by waiting for the oldest.

    Copies are asynchronous and hold their host buffers: without a limit, files that are read faster than the devices
    take them would pile up in host memory.
    """

    def __init__(self, limit: int = 2**30):
        self._limit, self._bytes = limit, 0
        self._arrays: deque[jax.Array] = deque()

    def add(self, array: jax.Array) -> None:
        """Counts one more; waits while there are too many."""
        self._arrays.append(array)
        self._bytes += array.nbytes
        while self._bytes > self._limit:
            oldest = self._arrays.popleft()
            self._bytes -= oldest.block_until_ready().nbytes


def stream_targets(the_plan: Plan, files: TensorFiles) -> Iterator[tuple[Target, np.ndarray]]:
    """Every parameter of the plan with its rows in the checkpoint's layout, in the order of the files."""
    for key, tensor in files.stream(key for key in files if key in the_plan.entries):
        yield from the_plan.split(key, tensor)


def place(target: Target, rows: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts one parameter on its devices in our layout.

    On one device a large tensor is copied as it is and transposed there. Over several each gets its own slice and no
    other.
    """
    alone = sharding is None or isinstance(sharding, jax.sharding.SingleDeviceSharding)
    if alone and rows.size >= TRANSPOSED_ON_DEVICE:
        there = rows if sharding is None else jax.device_put(rows, sharding)
        return _transposer(target.via, target.shape, target.is_kernel, dtype)(there)
    ours = target.to_ours(rows)
    ours = ours if dtype is None else ours.astype(dtype)
    if sharding is None:
        return jax.device_put(np.ascontiguousarray(ours))
    return jax.make_array_from_callback(target.shape, sharding, lambda index: ours[index])


@cache
def _transposer(via: str, shape: tuple[int, ...], is_kernel: bool, dtype: Any) -> Callable[[np.ndarray], jax.Array]:
    """One compiled copy for each distinct shape, not for each of a thousand parameters."""
    target = Target("kernel" if is_kernel else "bias", shape, via)

    def to_ours(rows: jax.Array) -> jax.Array:
        value = target.to_ours(rows)
        return value if dtype is None else value.astype(dtype)

    return jax.jit(to_ours)


def _parameters(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    for path, variable in nnx.to_flat_state(nnx.state(model, _is_base)):
        yield ".".join(map(str, path)), variable


def _is_base(path: tuple, variable: Any) -> bool:
    return isinstance(variable, nnx.Param) and not isinstance(variable, nnx.LoRAParam)
