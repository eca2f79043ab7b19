"""PEFT's adapters of Qwen2.5-VL: read, written, and added to the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.models.lora import Adapter, attach, detach, linear_shapes, linears
from rflow_jax.parallel.sharding import put_by
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.json_files import read_object
from rflow_jax.weights.key_mapping import KeyMapping
from rflow_jax.weights.loading import ShardingFor
from rflow_jax.weights.lora.export import peft_config
from rflow_jax.weights.safetensors_io import LayeredFiles, TensorFiles
from rflow_jax.weights.saving import save_tensors

Model = TypeVar("Model", bound=nnx.Module)

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # in front of every key
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# Unsupported options that change the meaning of the matrices.
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")


def common_name(key: str) -> str | None:
    """A key of any of the files, as the published Qwen2.5-VL names it; None for unused tensors.

    PEFT wraps names, and later versions of Transformers nest the two parts under ``model``.
    """
    if ".original_module." in key:
        return None
    key = key.removeprefix(PREFIX).removesuffix(".default")
    for wrapping in (".base_layer", ".default", ".modules_to_save"):
        key = key.replace(f"{wrapping}.", ".")
    for nested, plain in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if key.startswith(nested):
            return plain + key.removeprefix(nested)
    return key


def find_adapters(
    files: LayeredFiles,
    model: nnx.Module,
    table: KeyMapping,
    *,
    rank: int,
    alpha: float,
    rslora: bool,
    origin: str,
    unused: Collection[str] = (),
) -> dict[str, Adapter]:
    """Our dotted path -> adapter, for every LoRA of the files.

    Args:
        table: with published names.
        origin: the file that gives the rank, for messages.
        unused: modules whose LoRA is left out.

    Raises:
        InputError: an adapter of an unknown linear, or of another size.
    """
    halves: dict[str, dict[str, str]] = {}
    for key in files:
        if (match := _LORA.fullmatch(key)) and match["module"] not in unused:
            halves.setdefault(match["module"], {})[match["half"]] = key
    # The checkpoint's module -> our linears in it, in row order, with the rows of each.
    linears_in: dict[str, list[tuple[int, str, int]]] = {}
    for path, (_, rows) in linear_shapes(model).items():
        order, theirs, _ = table.module(path)
        linears_in.setdefault(theirs, []).append((order, path, rows))
    ours = {theirs: {path: rows for _, path, rows in sorted(parts)} for theirs, parts in linears_in.items()}
    adapters: dict[str, Adapter] = {}
    for module, keys in halves.items():
        home = files.home_of(next(iter(keys.values())))
        if module not in ours or keys.keys() != {"A", "B"}:
            raise InputError(f"{home}: {next(iter(keys.values()))} is not an adapter of a linear of this network")
        a, b = (files.read(keys[half]) for half in "AB")
        if a.shape[0] != rank:
            raise InputError(f"{home}: {module} has rank {a.shape[0]}, {origin} {rank}")
        if b.shape[0] != sum(ours[module].values()):
            raise InputError(f"{home}: {keys['B']} has {b.shape[0]} rows, not those of this network")
        rows = np.split(b, np.cumsum(list(ours[module].values()))[:-1])
        adapters |= {
            path: Adapter(a, np.ascontiguousarray(part), alpha, rslora)
            for path, part in zip(ours[module], rows, strict=True)
        }
    return adapters


def merged(model: Model) -> Model:
    """Adds every adapter to its linear's weights, in float32, and removes it."""
    for linear in linears(model).values():
        if linear.lora_a is None or linear.lora_b is None or linear.lora_scale is None:
            continue
        a, b, kernel = (jnp.asarray(x[...], jnp.float32) for x in (linear.lora_a, linear.lora_b, linear.kernel))
        change = jnp.dot(a, b, precision="highest") * linear.lora_scale[...]
        linear.kernel.set_value((kernel + change).astype(linear.kernel.dtype))
    return detach(model)


def attach_adapter(model: Model, folder: Path, table: KeyMapping, *, sharding_for: ShardingFor | None = None) -> Model:
    """Attaches the adapter in a folder that PEFT wrote.

    Args:
        table: with published names.
        sharding_for: of each of its matrices; None puts all on the default device.

    Raises:
        InputError: it is not an adapter, of another network, or of an unsupported kind.
    """
    lora = lora_settings(read_object(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)
    files = LayeredFiles([TensorFiles.open(folder / ADAPTER_FILE)], common_name)
    put = put_by(sharding_for) if sharding_for else None
    found = find_adapters(files, model, table, **lora, origin=f"{ADAPTER_CONFIG} says r")
    return attach(model, found, source=files.source, put=put)


def lora_settings(content: Mapping[str, Any], path: Path, *, modules_to_save: bool = False) -> dict[str, Any]:
    """``rank``, ``alpha`` and ``rslora`` in the content of an ``adapter_config.json``.

    Args:
        path: of that file, for messages.
        modules_to_save: whether whole modules may be saved with the LoRA.

    Raises:
        InputError: another kind of adapter, an option that is not supported, or these are missing.
    """
    unsupported = [name for name in _UNSUPPORTED if not (modules_to_save and name == "modules_to_save")]
    wrong = [name for name in unsupported if content.get(name)]
    if content.get("peft_type", "LORA") != "LORA" or wrong:
        what = ", ".join(wrong) or f"peft_type {content['peft_type']}"
        raise InputError(f"{path}: {what} is not supported")
    try:
        rank, alpha = int(content["r"]), float(content["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no r and lora_alpha; is it PEFT's?") from error
    return {"rank": rank, "alpha": alpha, "rslora": bool(content.get("use_rslora"))}


_EMBEDDING_LORA = (".lora_embedding_A", ".lora_embedding_B")
_ROWS = 1 << 14  # of an embedding that are changed together


class _MergedEmbedding(LayeredFiles):
    """Files whose embedding has its LoRA added; it is read in float32."""

    def __init__(self, files: LayeredFiles, key: str, a: np.ndarray, b: np.ndarray, scale: float):
        super().__init__([files], lambda name: None if name.endswith(_EMBEDDING_LORA) else name)
        self._embedding, self._a, self._b, self._scale = key, a, b, scale

    def read(self, key: str) -> np.ndarray:
        value = super().read(key)
        if key != self._embedding:
            return value
        value, b = value.astype(np.float32), self._b.astype(np.float32).T * np.float32(self._scale)
        for start in range(0, len(value), _ROWS):
            rows = slice(start, start + _ROWS)
            value[rows] += self._a[:, rows].astype(np.float32).T @ b
        return value


def with_merged_embedding(files: LayeredFiles, key: str, *, rank: int, alpha: float, rslora: bool) -> LayeredFiles:
    """The files with the LoRA of the embedding ``key``, if there is one, added to it.

    Raises:
        InputError: it is of another size.
    """
    a, b = (key.removesuffix(".weight") + half for half in _EMBEDDING_LORA)
    if a not in files or b not in files:
        return files
    (rows, width), found = files[key].shape, (files[a].shape, files[b].shape)
    if found != ((rank, rows), (width, rank)):
        sizes = " and ".join(str(list(shape)) for shape in found)
        raise InputError(f"{files.home_of(a)}: {a} and its B are {sizes}, not of rank {rank} for {rows} x {width}")
    matrices = files.read(a), files.read(b)
    return _MergedEmbedding(files, key, *matrices, Adapter(*matrices, alpha, rslora).scale)


def export_adapter(adapters: Mapping[str, Adapter], table: KeyMapping, base: str, folder: Path, **config: Any) -> None:
    """Writes adapters as PEFT does.

    Args:
        adapters: by our dotted path.
        table: with the names of the network that the adapter is for.
        base: folder or Hub id of that network.
        config: further entries of ``adapter_config.json``.
    """
    named = {table.module(path)[1]: adapter for path, adapter in adapters.items()}
    tensors: dict[str, np.ndarray] = {}
    for name, adapter in named.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": adapter.a, f"{PREFIX}{name}.lora_B.weight": adapter.b}
    save_tensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})
    content = peft_config(named) | {"base_model_name_or_path": base} | config
    write_file(folder / ADAPTER_CONFIG, json.dumps(content, indent=2) + "\n")
