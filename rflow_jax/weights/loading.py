"""Fills an abstract network from a checkpoint, one tensor at a time, straight onto the devices."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.weights.key_mapping import KeyMapping, MappingPlan, TensorTarget, plan
from rflow_jax.weights.safetensors_io import WINDOW, TensorFiles

Model = TypeVar("Model", bound=nnx.Module)
# Elements from which a transposition is worth a compiled program.
TRANSPOSED_ON_DEVICE = 2**20
# Bytes from which slices go to the devices one by one; for fewer, the calls take longer than the copy.
ONE_BY_ONE = 2**20
# (dotted path, shape) -> the sharding of the parameter; None: the default device.
ShardingFor = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def parameter_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Dotted path -> shape of every ``nnx.Param`` except LoRA (abstract or concrete)."""
    return {path: tuple(variable.shape) for path, variable in _parameters(model)}


def parameter_values(model: nnx.Module) -> dict[str, Any]:
    """Dotted path -> value of every ``nnx.Param`` except LoRA."""
    return {path: variable[...] for path, variable in _parameters(model)}


def parameter_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Dotted path -> the variable of every ``nnx.Param`` except LoRA; setting it sets the model's."""
    return dict(_parameters(model))


def load_into(
    model: Model,
    table: KeyMapping,
    files: TensorFiles,
    *,
    dtype: Dtype | None = None,
    sharding_for: ShardingFor | None = None,
    on_bytes: Callable[[int], None] | None = None,
    window: int = WINDOW,
) -> Model:
    """Reads a checkpoint into ``model`` (abstract, from ``nnx.eval_shape``) and returns it.

    Every tensor goes from the file to its devices, and each of those gets its own slice. Besides the shards of its own
    devices a host holds two windows, tensors read ahead and tensors being copied, each of ``window`` bytes, or of one
    tensor if that is larger. It never holds the whole checkpoint.

    Args:
        dtype: of the parameters; None keeps the checkpoint's.
        sharding_for: of each parameter; None puts all on the default device.
        on_bytes: called with the bytes of each tensor once it is on the devices.
        window: bytes.

    Raises:
        InputError: keys or shapes other than the network's.
    """
    mapping_plan = plan(table, parameter_shapes(model))
    mapping_plan.check_files(files)
    variables = parameter_variables(model)
    arriving = Arriving(window)
    for target, rows in stream_targets(mapping_plan, files, window):
        arriving.make_room(rows.nbytes)
        value = place(target, rows, dtype, sharding_for(target.path, target.shape) if sharding_for else None)
        variables[target.path].set_value(value)
        arriving.add(value)
        if on_bytes:
            on_bytes(rows.nbytes)
        del rows  # otherwise it would outlive its turn in the window
    return model


class Arriving:
    """Arrays being copied to the devices, kept below a number of bytes by waiting for the oldest.

    Copies are asynchronous and hold their host buffers: without a limit, files that are read faster than they are
    copied would pile up in host memory.
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
        """Adds an array that is being copied."""
        self._arrays.append(array)
        self._bytes += array.nbytes


def stream_targets(
    mapping_plan: MappingPlan, files: TensorFiles, ahead: int
) -> Iterator[tuple[TensorTarget, np.ndarray]]:
    """Every parameter of the plan with its rows in the checkpoint's layout, in the order of the files."""
    for key, tensor in files.stream((key for key in files if key in mapping_plan.entries), ahead=ahead):
        yield from mapping_plan.split(key, tensor)
        del tensor


def place(target: TensorTarget, rows: np.ndarray, dtype: Dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts one parameter on its devices in our layout.

    On one device a large tensor is copied as it is and transposed there. Of several devices each gets only its slice.
    """
    alone = sharding is None or isinstance(sharding, jax.sharding.SingleDeviceSharding)
    if alone and rows.size >= TRANSPOSED_ON_DEVICE:
        array = rows if sharding is None else jax.device_put(rows, sharding)
        return _transposer(target.via, target.shape, target.is_kernel, dtype)(array)
    return put(target.to_ours(rows), dtype, sharding)


def put(value: np.ndarray, dtype: Dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts one parameter, already in our layout, on its devices.

    Slices of a large one are cut before they are cast or transposed, one after the other: the host never holds a
    second whole copy.
    """

    def cast(piece: np.ndarray) -> np.ndarray:
        return piece if dtype is None else piece.astype(dtype, copy=False)

    if sharding is None:
        return jax.device_put(np.asarray(cast(value), order="C"))
    if value.nbytes < ONE_BY_ONE:
        return jax.make_array_from_callback(value.shape, sharding, cast(value).__getitem__)
    indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(value.shape)
    holders: dict[tuple, list[Any]] = {}  # every slice once, with the devices that hold it
    for device, index in indices.items():
        holders.setdefault(tuple((part.start, part.stop) for part in index), []).append(device)
    pieces: dict[Any, jax.Array] = {}
    for devices in holders.values():
        piece = cast(value[indices[devices[0]]])
        pieces |= {device: jax.device_put(piece, device) for device in devices}
    return jax.make_array_from_single_device_arrays(value.shape, sharding, [pieces[device] for device in indices])


@cache
def _transposer(via: str, shape: tuple[int, ...], is_kernel: bool, dtype: Dtype) -> Callable[[np.ndarray], jax.Array]:
    """A compiled transposition per distinct shape, not per parameter."""
    target = TensorTarget("kernel" if is_kernel else "bias", shape, via)

    def to_ours(rows: jax.Array) -> jax.Array:
        value = target.to_ours(rows)
        return value if dtype is None else value.astype(dtype)

    return jax.jit(to_ours)


def _parameters(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))):
        yield ".".join(map(str, path)), variable
