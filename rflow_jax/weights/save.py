"""Our model folder: diffusers' layout with parameters under our names, written tensor by tensor.

Each network's subfolder holds its ``config.json`` and either ``params-00001-of-0000N.safetensors`` with an
index, or an Orbax checkpoint in ``params/``. ``rflow_model.json`` at the top, written last, says which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rflow_jax.weights.conversion import Conversion, Leaf, OnBytes
from rflow_jax.weights.writing import write_safetensors

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
        from rflow_jax.weights.orbax_files import save_orbax  # slow to import

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
