"""Our model folder: diffusers' layout with parameters under our names, written tensor by tensor.

Each network's subfolder holds its ``config.json`` and either ``params-00001-of-0000N.safetensors`` with an
index, or an Orbax checkpoint in ``params/``. ``rflow_model.json`` at the top, written last, says which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.weights.key_mapping import MappingPlan
from rflow_jax.weights.loading import Arriving, ShardingFor, parameter_variables, put
from rflow_jax.weights.orbax_io import orbax_leaves, read_orbax, save_orbax
from rflow_jax.weights.safetensors_io import WINDOW, TensorFiles
from rflow_jax.weights.saving import Conversion, OnBytes, in_windows, write_safetensors

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
    shards = list(in_windows(conversion.leaves(), shard_bytes))
    stream = conversion.stream(on_bytes)
    weight_map: dict[str, str] = {}
    for number, leaves in enumerate(shards, 1):
        name = f"params-{number:05d}-of-{len(shards):05d}.safetensors"
        infos = {leaf.path: (leaf.dtype, leaf.shape) for leaf in leaves}
        write_safetensors(folder / name, infos, islice(stream, len(leaves)), {"format": "rflow_jax"})
        weight_map |= dict.fromkeys(infos, name)
    for _ in stream:  # so that the last tensor is counted
        raise AssertionError("more parameters than leaves")
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": conversion.nbytes}, "weight_map": weight_map})


def save(conversion: Conversion, folder: Path, storage: Storage, *, on_bytes: OnBytes | None = None) -> None:
    """Writes one network's parameters in the given storage."""
    if storage == "safetensors":
        save_safetensors(conversion, folder, on_bytes=on_bytes)
    else:
        save_orbax(conversion, folder / ORBAX_FOLDER, on_bytes=on_bytes)


def write_model_file(folder: Path, storage: Storage, components: Iterable[str], source: str) -> None:
    """Marks a folder as a complete model in our layout."""
    content = {"format": FORMAT, "version": VERSION, "storage": storage, "components": sorted(components)}
    write_json(folder / MODEL_FILE, content | {"source": source})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n")


Model = TypeVar("Model", bound=nnx.Module)


def is_stored(folder: Path) -> bool:
    """Whether a network's subfolder holds parameters in our own layout."""
    return (folder / INDEX_FILE).is_file() or (folder / ORBAX_FOLDER).is_dir()


class StoredAsTheirs(TensorFiles):
    """A network's parameters in our own layout, seen as the tensors of the checkpoint that they came from.

    Args:
        folder: the network's subfolder.
        plan: of that checkpoint's tensors.

    Raises:
        InputError: not stored as safetensors, incomplete, or of other sizes than the configuration says.
    """

    def __init__(self, folder: Path, plan: MappingPlan):
        if (folder / ORBAX_FOLDER).is_dir():
            raise InputError(f"{folder}: stored by Orbax; convert again with --format safetensors")
        self._own, self._plan = TensorFiles.open(folder), plan
        targets = [target for own in plan.entries.values() for target in own]
        _check({target.path: target for target in targets}, self._own.shapes, str(folder))
        self.files, self.metadata = self._own.files, {}
        self._infos = {}
        for key, members in plan.entries.items():
            infos = [self._own[target.path] for target in members]
            nbytes = sum(info.nbytes for info in infos)
            self._infos[key] = replace(infos[0], shape=plan.their_shape(key), nbytes=nbytes)

    def read(self, key: str) -> np.ndarray:
        return self._plan.join(key, {target.path: self._own.read(target.path) for target in self._plan.entries[key]})


def stored_bytes(folder: Path) -> int:
    """Bytes of a stored network's parameters."""
    if (folder / ORBAX_FOLDER).is_dir():
        return sum(leaf.nbytes for leaf in orbax_leaves(folder / ORBAX_FOLDER).values())
    return TensorFiles.open(folder).nbytes


def load_stored(
    model: Model,
    folder: Path,
    *,
    dtype: Dtype | None = None,
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
    variables, on_bytes = parameter_variables(model), on_bytes or (lambda _: None)
    sharding_for = sharding_for or (lambda path, shape: None)
    if (folder / ORBAX_FOLDER).is_dir():
        stored = orbax_leaves(folder / ORBAX_FOLDER)
        _check(variables, {path: leaf.shape for path, leaf in stored.items()}, str(folder))
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        leaves = list(stored.values())
        shardings = [sharding_for(leaf.path, leaf.shape) or default for leaf in leaves]
        for leaf, value in read_orbax(folder / ORBAX_FOLDER, leaves, shardings, dtype, window):
            variables[leaf.path].set_value(value)
            on_bytes(leaf.nbytes)
        return model
    files = TensorFiles.open(folder)
    _check(variables, files.shapes, str(folder))
    arriving = Arriving(window)
    for path, value in files.stream(ahead=window):
        arriving.make_room(value.nbytes)
        array = put(value, dtype, sharding_for(path, value.shape))
        variables[path].set_value(array)
        arriving.add(array)
        on_bytes(value.nbytes)
        del value  # otherwise it would outlive its turn in the window
    return model


def _check(variables: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    for problem, paths in (
        ("missing", variables.keys() - shapes.keys()),
        ("not known to this network", shapes.keys() - variables.keys()),
    ):
        if paths:
            raise InputError(f"{source}: {len(paths)} parameters {problem}, such as {min(paths)}; convert again")
    for path, variable in variables.items():
        if tuple(shapes[path]) != tuple(variable.shape):
            raise InputError(
                f"{source}: {path} has shape {list(shapes[path])}, the configuration asks for {list(variable.shape)}"
            )
