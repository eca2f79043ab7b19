"""Our model folder: diffusers' layout with parameters under our names, written tensor by tensor.

Each network's subfolder holds its ``config.json`` and either ``params-00001-of-0000N.safetensors`` with an
index, or an Orbax checkpoint in ``params/``. ``rflow_model.json`` at the top, written last, says which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.weights.key_mapping import MappingPlan
from rflow_jax.weights.loading import Arriving, ShardingFor, parameter_variables, put
from rflow_jax.weights.orbax_io import orbax_leaves, read_orbax
from rflow_jax.weights.safetensors_io import WINDOW, TensorFiles, TensorInfo
from rflow_jax.weights.saving import Conversion, Leaf, OnBytes, write_safetensors

Storage = Literal["safetensors", "orbax"]

MODEL_FILE = "rflow_model.json"
FORMAT, VERSION = "rflow_jax model", 1
INDEX_FILE = "params.safetensors.index.json"
ORBAX_FOLDER = "params"
SHARD_BYTES = 2**30


def save_safetensors(
    conversion: Conversion, folder: Path, *, shard_bytes: int = SHARD_BYTES, on_bytes: OnBytes | None = None
) -> None:
    """Writes shards of at most ``shard_bytes`` (or one tensor) and their index into ``folder``."""
    shards = list(_shards(conversion.leaves(), shard_bytes))
    stream = conversion.stream(on_bytes)
    weight_map: dict[str, str] = {}
    for number, leaves in enumerate(shards, 1):
        name = f"params-{number:05d}-of-{len(shards):05d}.safetensors"
        infos = {leaf.path: (leaf.dtype, leaf.shape) for leaf in leaves}
        write_safetensors(folder / name, infos, islice(stream, len(leaves)), {"format": "rflow_jax"})
        weight_map |= dict.fromkeys(infos, name)
    for _ in stream:  # lets the last tensor be counted
        raise AssertionError("more parameters than leaves")
    total = sum(leaf.nbytes for leaves in shards for leaf in leaves)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save(conversion: Conversion, folder: Path, storage: Storage, *, on_bytes: OnBytes | None = None) -> None:
    """Writes one network's parameters in the storage asked for."""
    if storage == "safetensors":
        save_safetensors(conversion, folder, on_bytes=on_bytes)
    else:
        from rflow_jax.weights.orbax_io import save_orbax  # slow to import

        save_orbax(conversion, folder / ORBAX_FOLDER, on_bytes=on_bytes)


def write_model_file(folder: Path, storage: Storage, components: Iterable[str], source: str) -> None:
    """Marks a folder as a whole model of ours."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "storage": storage,
        "components": sorted(components),
        "source": source,
    }
    _write_json(folder / MODEL_FILE, content)


def _shards(leaves: Iterable[Leaf], limit: int) -> Iterator[list[Leaf]]:
    shard: list[Leaf] = []
    size = 0
    for leaf in leaves:
        if shard and size + leaf.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(leaf)
        size += leaf.nbytes
    if shard:
        yield shard


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


Model = TypeVar("Model", bound=nnx.Module)


def is_stored(folder: Path) -> bool:
    """Whether a network's subfolder holds parameters in our own layout."""
    return (folder / INDEX_FILE).is_file() or (folder / ORBAX_FOLDER).is_dir()


class StoredAsTheirs(TensorFiles):
    """A network's parameters in our own layout, seen as the tensors of the checkpoint that they came from.

    Args:
        folder: the network's subfolder.
        the_plan: of that checkpoint's tensors.

    Raises:
        InputError: not stored as safetensors, incomplete, or of other sizes than the configuration says.
    """

    def __init__(self, folder: Path, the_plan: MappingPlan):
        if (folder / ORBAX_FOLDER).is_dir():
            raise InputError(f"{folder}: stored by Orbax; convert again with --format safetensors")
        self._own, self._plan = TensorFiles.open(folder), the_plan
        targets = [target for own in the_plan.entries.values() for target in own]
        _check({target.path: target for target in targets}, self._own.shapes, str(folder))
        self.files, self.metadata = self._own.files, {}
        self._infos = {key: self._info(key) for key in the_plan.entries}

    def read(self, key: str) -> np.ndarray:
        return self._plan.join(key, {target.path: self._own.read(target.path) for target in self._plan.entries[key]})

    def _info(self, key: str) -> TensorInfo:
        infos = [self._own[target.path] for target in self._plan.entries[key]]
        nbytes = sum(info.nbytes for info in infos)
        return replace(infos[0], shape=self._plan.their_shape(key), nbytes=nbytes)


def stored_bytes(folder: Path) -> int:
    """Bytes of a stored network's parameters."""
    if (folder / ORBAX_FOLDER).is_dir():
        return sum(leaf.nbytes for leaf in orbax_leaves(folder / ORBAX_FOLDER).values())
    return TensorFiles.open(folder).nbytes


def load_stored(
    model: Model,
    folder: Path,
    *,
    dtype: Any = None,
    sharding_for: ShardingFor | None = None,
    on_bytes: Callable[[int], None] | None = None,
    window: int = WINDOW,
) -> Model:
    """Reads a network that :mod:`rflow_jax.weights.model_folder` wrote into ``model`` (abstract) and returns it.

    Args:
        folder: the network's subfolder.
        dtype, sharding_for, on_bytes, window: as in :func:`rflow_jax.weights.loading.load_into`.

    Raises:
        InputError: not stored by us, incomplete, or of other sizes than the configuration says.
    """
    variables = parameter_variables(model)
    load = _load_orbax if (folder / ORBAX_FOLDER).is_dir() else _load_safetensors
    load(variables, folder, dtype, sharding_for, on_bytes or (lambda _: None), window)
    return model


def _load_safetensors(
    variables: Mapping[str, Any],
    folder: Path,
    dtype: Any,
    sharding_for: ShardingFor | None,
    on_bytes: Callable[[int], None],
    window: int,
) -> None:
    files = TensorFiles.open(folder)
    _check(variables, files.shapes, str(folder))
    arriving = Arriving(window)
    for path, value in files.stream(ahead=window):
        arriving.make_room(value.nbytes)
        placed = put(value, dtype, sharding_for(path, value.shape) if sharding_for else None)
        variables[path].set_value(placed)
        arriving.add(placed)
        on_bytes(value.nbytes)
        del value  # else it would outlive its place in the window


def _load_orbax(
    variables: Mapping[str, Any],
    folder: Path,
    dtype: Any,
    sharding_for: ShardingFor | None,
    on_bytes: Callable[[int], None],
    window: int,
) -> None:
    stored = orbax_leaves(folder / ORBAX_FOLDER)
    _check(variables, {path: leaf.shape for path, leaf in stored.items()}, str(folder))
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = list(stored.values())
    shardings = [(sharding_for(leaf.path, leaf.shape) if sharding_for else None) or default for leaf in leaves]
    for leaf, value in read_orbax(folder / ORBAX_FOLDER, leaves, shardings, dtype, window):
        variables[leaf.path].set_value(value)
        on_bytes(leaf.nbytes)


def _check(variables: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    for problem, paths in (
        ("missing", variables.keys() - shapes.keys()),
        ("not known to this network", shapes.keys() - variables.keys()),
    ):
        if paths:
            raise InputError(f"{where}: {len(paths)} parameters {problem}, such as {min(paths)}; convert again")
    for path, variable in variables.items():
        if tuple(shapes[path]) != tuple(variable.shape):
            raise InputError(
                f"{where}: {path} has shape {list(shapes[path])}, the configuration asks for {list(variable.shape)}"
            )
