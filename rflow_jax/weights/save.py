"""Our model folder: diffusers' layout with parameters under our names, written tensor by tensor.

Each network's subfolder holds its ``config.json`` and either ``params-00001-of-0000N.safetensors`` with an
index, or an Orbax checkpoint in ``params/``. ``rflow_model.json`` at the top, written last, says which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.tables import Plan
from rflow_jax.weights.writing import write_safetensors

Storage = Literal["safetensors", "orbax"]

MODEL_FILE = "rflow_model.json"
FORMAT, VERSION = "rflow_jax model", 1
INDEX_FILE = "params.safetensors.index.json"
ORBAX_FOLDER = "params"
SHARD_BYTES = 2**30
AHEAD_BYTES = 2**28  # of the checkpoint's tensors read before they are needed

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Leaf:
    """One parameter to be written: our path, and what it will be in the file."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Conversion:
    """A checkpoint seen through a plan: what it will become, and that, one parameter at a time.

    Args:
        dtype: of the parameters; None keeps each tensor's.
    """

    def __init__(self, the_plan: Plan, files: TensorFiles, dtype: Any = None):
        self.plan = the_plan
        self.files = files
        self.dtype = None if dtype is None else np.dtype(dtype)
        self.keys = [key for key in files if key in the_plan.entries]

    def leaves(self) -> list[Leaf]:
        """Every parameter, in the order of the checkpoint's files."""
        return [
            Leaf(target.path, self.dtype or self.files[key].dtype, target.shape)
            for key in self.keys
            for target in self.plan.entries[key]
        ]

    def stream(self, on_bytes: OnBytes | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """(our path, parameter) in the order of :meth:`leaves`; the host holds a few tensors at a time."""
        for key, tensor in self.files.stream(self.keys, ahead=AHEAD_BYTES):
            yield from self._ours(key, tensor)
            if on_bytes:
                on_bytes(tensor.nbytes)

    def read(self, key: str) -> dict[str, np.ndarray]:
        """The parameters that one of the checkpoint's tensors holds."""
        return dict(self._ours(key, self.files.read(key)))

    def _ours(self, key: str, tensor: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for target, rows in self.plan.split(key, tensor):
            value = target.to_ours(rows)
            yield target.path, np.ascontiguousarray(value if self.dtype is None else value.astype(self.dtype))


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
        from rflow_jax.weights.orbax_files import save_orbax

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
