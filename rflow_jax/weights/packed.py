"""Model folders with matrices in 8 bits, a quarter of their size, and the sum of every file: what a package carries.

A packed folder is unpacked once, into the cache, and is from then on a folder like any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.utils.atomic_io import beneath
from rflow_jax.utils.cache import cache_folder
from rflow_jax.utils.files import is_file, sha256_of
from rflow_jax.utils.json_files import naming, read_object
from rflow_jax.weights.model_folder import write_json
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import atomic_output, save_tensors

MANIFEST = "packed.json"
VERSION = 1
_FORMAT = "rflow packed"
_SCALE = "::scale"
_LEAST = 4096  # numbers of a tensor that is worth packing
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def pack_folder(src: Path, dst: Path, made: Mapping[str, Any]) -> int:
    """Packs a folder; returns the bytes of the packed one.

    Args:
        made: how its content was made (recipes, versions, hardware), for the manifest.

    Raises:
        InputError: ``dst`` exists, ``src`` is packed already, or a file cannot be read.
    """
    if is_packed(src):
        raise InputError(f"{src}: packed already; pack the folder that it was made from")
    with atomic_output(dst) as partial:
        partial.mkdir()
        for file in sorted(path for path in src.rglob("*") if path.is_file()):
            target = partial / file.relative_to(src)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                tensors = TensorFiles.open(file)
                save_tensors(target, _packed({key: tensors.read(key) for key in tensors}), tensors.metadata)
            else:
                shutil.copyfile(file, target)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        sums = {path.relative_to(partial).as_posix(): _sum(path) for path in files}
        write_json(partial / MANIFEST, {"format": _FORMAT, "version": VERSION, "files": sums, "made": dict(made)})
    return sum(path.stat().st_size for path in dst.rglob("*") if path.is_file())


def is_packed(folder: Path) -> bool:
    """Whether this is a packed folder."""
    return (folder / MANIFEST).is_file()


def unpacked(folder: Path) -> Path:
    """A packed folder's content in the cache, in bfloat16 where it was packed; unpacks it if it is not there yet.

    Raises:
        InputError: a file is missing or damaged, or of a newer version.
        OSError: the cache cannot be written.
    """
    manifest = read_object(folder / MANIFEST)
    if manifest.get("format") != _FORMAT or manifest.get("version") != VERSION:
        raise InputError(f"{folder / MANIFEST}: not a packed model of version {VERSION}")
    name = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    found = cache_folder("models") / f"{folder.name}-{name}"
    if found.is_dir():
        return found
    sums = manifest.get("files")
    if not isinstance(sums, dict):
        raise InputError(f"{folder / MANIFEST}: no files; install or copy the folder again")
    for relative, wanted in sums.items():
        with naming(folder / MANIFEST):
            file = beneath(folder, relative)
        if not is_file(file) or _sum(file) != wanted:
            raise InputError(f"{file}: missing or damaged: its sum is not the recorded one; install or copy it again")
    found.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=found.parent, prefix=".unpacking-", ignore_cleanup_errors=True) as partial:
        for relative in sums:
            target = Path(partial, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            _unpack(folder / relative, target)
        try:
            os.rename(partial, found)
        except OSError:
            if not found.is_dir():  # another process may have been faster
                raise
    return found


def _unpack(file: Path, target: Path) -> None:
    if file.suffix != ".safetensors":
        shutil.copyfile(file, target)
        return
    tensors = TensorFiles.open(file)
    whole = {}
    for key in tensors:
        if not key.endswith(_SCALE):
            scale = tensors.read(key + _SCALE) if key + _SCALE in tensors else None
            value = tensors.read(key)
            if scale is not None:
                value = (value.astype(np.float32) * _column(scale.astype(np.float32), value.ndim)).astype(
                    ml_dtypes.bfloat16
                )
            whole[key] = value
    save_tensors(target, whole, tensors.metadata)


def _packed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Large matrices as int8 with one scale a row, other floats as bfloat16, all else as it is."""
    found: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        if value.dtype not in _FLOATS:
            found[key] = value
        elif value.ndim < 2 or value.size < _LEAST:
            found[key] = value.astype(ml_dtypes.bfloat16)
        else:
            whole = value.astype(np.float32)
            largest = np.abs(whole).reshape(len(whole), -1).max(axis=1)
            scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
            # Half precision where it has all its digits for these numbers.
            small = scale.astype(np.float16) if np.finfo(np.float16).tiny <= scale.min() <= scale.max() < 1e4 else scale
            found[key] = np.rint(whole / _column(small.astype(np.float32), whole.ndim)).clip(-127, 127).astype(np.int8)
            found[key + _SCALE] = small
    return found


def _column(scale: np.ndarray, ndim: int) -> np.ndarray:
    return scale.reshape(-1, *[1] * (ndim - 1))


def _sum(file: Path) -> str:
    return sha256_of(file)
