"""Fills an abstract network from a checkpoint, one tensor at a time, straight into its place on the devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from rflow_jax.weights.key_mapping import KeyMapping, MappingPlan, TensorTarget, plan
from rflow_jax.weights.safetensors_io import WINDOW, TensorFiles

Model = TypeVar("Model", bound=nnx.Module)
# Elements from which the transposition is worth a compiled program of its own.
TRANSPOSED_ON_DEVICE = 2**20
# Bytes from which slices go to the devices one by one: a call for each device takes longer than to copy so few.
ONE_BY_ONE = 2**20
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
    table: KeyMapping,
    files: TensorFiles,
    *,
    dtype: Any = None,
    sharding_for: ShardingFor | None = None,
    on_bytes: Callable[[int], None] | None = None,
    window: int = WINDOW,
) -> Model:
    """Reads a checkpoint into ``model`` (abstract, from ``nnx.eval_shape``) and returns it.

    Every tensor goes from the file to its devices, and each of those gets its own slice. Beside the shards of its own
    devices a host holds two windows: of tensors read ahead and of tensors on their way, each of ``window`` bytes, or of
    one tensor where that is larger. It never holds the checkpoint.

    Args:
        dtype: of the parameters; None keeps the checkpoint's.
        sharding_for: where each parameter lives; None puts all on the default device.
        on_bytes: told of the bytes of each tensor when it is placed.
        window: bytes.

    Raises:
        InputError: keys or shapes that are not exactly the network's.
    """
    the_plan = plan(table, parameter_shapes(model))
    the_plan.check_files(files)
    variables = parameter_variables(model)
    arriving = Arriving(window)
    for target, rows in stream_targets(the_plan, files, window):
        arriving.make_room(rows.nbytes)
        value = place(target, rows, dtype, sharding_for(target.path, target.shape) if sharding_for else None)
        variables[target.path].set_value(value)
        arriving.add(value)
        if on_bytes:
            on_bytes(rows.nbytes)
        del rows  # else it would outlive its place in the window
    return model


class Arriving:
    """Arrays on their way to the devices, kept below a number of bytes by waiting for the oldest.

    Copies are asynchronous and hold their host buffers: without a limit, files that are read faster than the devices
    take them would pile up in host memory.
    """

    def __init__(self, limit: int = WINDOW):
        self._limit, self._bytes = limit, 0
        self._arrays: deque[jax.Array] = deque()

    def make_room(self, nbytes: int) -> None:
        """Waits until one more of this size stays below the limit, or is alone."""
        while self._arrays and self._bytes + nbytes > self._limit:
            oldest = self._arrays.popleft()
            self._bytes -= oldest.block_until_ready().nbytes

    def add(self, array: jax.Array) -> None:
        """Counts one more."""
        self._arrays.append(array)
        self._bytes += array.nbytes


def stream_targets(
    the_plan: MappingPlan, files: TensorFiles, ahead: int = WINDOW
) -> Iterator[tuple[TensorTarget, np.ndarray]]:
    """Every parameter of the plan with its rows in the checkpoint's layout, in the order of the files."""
    for key, tensor in files.stream((key for key in files if key in the_plan.entries), ahead=ahead):
        yield from the_plan.split(key, tensor)
        del tensor


def place(target: TensorTarget, rows: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts one parameter on its devices in our layout.

    On one device a large tensor is copied as it is and transposed there. Over several each gets its own slice and no
    other.
    """
    alone = sharding is None or isinstance(sharding, jax.sharding.SingleDeviceSharding)
    if alone and rows.size >= TRANSPOSED_ON_DEVICE:
        there = rows if sharding is None else jax.device_put(rows, sharding)
        return _transposer(target.via, target.shape, target.is_kernel, dtype)(there)
    return put(target.to_ours(rows), dtype, sharding)


def put(value: np.ndarray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts one parameter, already in our layout, on its devices.

    Slices of a large one are cut before they are cast or laid out anew, one after the other: the host never holds a
    second copy of all.
    """

    def cast(piece: np.ndarray) -> np.ndarray:
        return piece if dtype is None else piece.astype(dtype, copy=False)

    if sharding is None:
        return jax.device_put(np.asarray(cast(value), order="C"))
    if value.nbytes < ONE_BY_ONE:
        return jax.make_array_from_callback(value.shape, sharding, cast(value).__getitem__)
    places = sharding.addressable_devices_indices_map(value.shape)
    pieces: dict[Any, jax.Array] = {}
    for index, devices in _by_index(places):
        piece = cast(value[index])
        pieces |= {device: jax.device_put(piece, device) for device in devices}
    return jax.make_array_from_single_device_arrays(value.shape, sharding, [pieces[device] for device in places])


def _by_index(places: Mapping[Any, Any]) -> list[tuple[tuple[slice, ...], list[Any]]]:
    """Every slice once, with the devices that hold it."""
    grouped: dict[tuple, tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in places.items():
        bounds = tuple((part.start, part.stop) for part in index)
        grouped.setdefault(bounds, (index, []))[1].append(device)
    return list(grouped.values())


@cache
def _transposer(via: str, shape: tuple[int, ...], is_kernel: bool, dtype: Any) -> Callable[[np.ndarray], jax.Array]:
    """One compiled copy for each distinct shape, not for each of a thousand parameters."""
    target = TensorTarget("kernel" if is_kernel else "bias", shape, via)

    def to_ours(rows: jax.Array) -> jax.Array:
        value = target.to_ours(rows)
        return value if dtype is None else value.astype(dtype)

    return jax.jit(to_ours)


def _parameters(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    for path, variable in nnx.to_flat_state(nnx.state(model, _is_base)):
        yield ".".join(map(str, path)), variable


def _is_base(path: tuple, variable: Any) -> bool:
    return isinstance(variable, nnx.Param) and not isinstance(variable, nnx.LoRAParam)
