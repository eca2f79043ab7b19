"""Safetensors files written tensor by tensor, and outputs that are either complete or absent.

The safetensors library's own writer needs all tensors of a file in memory, and they must be contiguous.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.utils.atomic_io import make_folder, sync_folder, sync_tree
from rflow_jax.utils.output_folder import require_present, try_lock, usable_folder
from rflow_jax.weights.key_mapping import KeyMapping, MappingPlan, plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.safetensors_header import DTYPES
from rflow_jax.weights.safetensors_io import TensorFiles

log = logging.getLogger(__name__)

PARTIAL = ".partial"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 8


def write_safetensors(
    path: Path,
    infos: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file; ``tensors`` come in the order of ``infos`` and are held one at a time.

    Args:
        infos: key -> (dtype, shape), for the header, which is written before the first tensor is there.
        metadata: string pairs for the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for key, (dtype, shape) in infos.items():
        end = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        expected = iter(infos.items())
        for key, tensor in tensors:
            want_key, (dtype, shape) = next(expected)
            if (key, tensor.dtype, tensor.shape) != (want_key, dtype, shape):
                raise ValueError(f"{path}: {key} {tensor.dtype} {tensor.shape} came instead of {want_key}")
            # Viewed as bytes: numpy's own buffers don't know bfloat16.
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        if left := next(expected, None):
            raise ValueError(f"{path}: {left[0]} never came")


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors that are all in memory, sorted by key."""
    ordered = dict(sorted(tensors.items()))
    write_safetensors(path, {k: (v.dtype, v.shape) for k, v in ordered.items()}, ordered.items(), metadata)


@contextmanager
def atomic_output(dst: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside ``dst`` to write a file or folder to, which becomes ``dst`` when all is written.

    After an error nothing stays behind; after a crash only ``dst`` with the suffix :data:`PARTIAL`, which the next
    attempt replaces.

    Raises:
        InputError: ``dst`` exists, cannot be made, or another process is writing it.
        OSError: it cannot be written; names ``dst``.
    """
    dst = Path(dst)
    if os.path.lexists(dst):
        raise InputError(f"{dst}: exists already, and nothing is overwritten; remove it or name another path")
    require_present(dst)
    with usable_folder(dst.parent), _alone(dst):
        if os.path.lexists(dst):  # by then
            raise InputError(f"{dst}: exists already, and nothing is overwritten; remove it or name another path")
        make_folder(dst.parent)
        with _whole_or_absent(dst) as partial:
            yield partial


@contextmanager
def _alone(dst: Path) -> Iterator[None]:
    """Locks out other processes that write the same output; without locks on that disk there is a warning."""
    lock = dst.with_name(f".{dst.name}.lock")
    try:
        held = try_lock(lock)
    except InputError as error:
        log.warning("%s; make sure that no other process writes it", error)
        yield
        return
    if held is None:
        raise InputError(f"{dst}: another process is writing it; wait for it, or name another path")
    with held:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is locked: it must not be another's by then


@contextmanager
def _whole_or_absent(dst: Path) -> Iterator[Path]:
    partial = dst.with_name(dst.name + PARTIAL)
    _remove(partial)
    try:
        yield partial
        sync_tree(partial)
        os.replace(partial, dst)
        sync_folder(dst.parent)
    except OSError as error:
        _remove(partial)
        # A write does not know its file's name, and the partial one is gone.
        if error.filename is None or str(error.filename).startswith(str(partial)):
            error.filename = str(dst)
        raise
    except BaseException:
        _remove(partial)
        raise


def need_space(dst: Path, nbytes: int) -> None:
    """Raises InputError if the disk of ``dst`` has less than ``nbytes`` free."""
    existing = next(p for p in (dst.absolute(), *dst.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise InputError(f"{dst}: needs {nbytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def in_windows(leaves: Iterable[Leaf], limit: int) -> Iterator[list[Leaf]]:
    """Cuts leaves into runs of at most ``limit`` bytes; a larger leaf is alone."""
    window: list[Leaf] = []
    size = 0
    for leaf in leaves:
        if window and size + leaf.nbytes > limit:
            yield window
            window, size = [], 0
        window.append(leaf)
        size += leaf.nbytes
    if window:
        yield window


class Conversion:
    """The parameters that a checkpoint's tensors become, one at a time.

    Args:
        dtype: of the parameters; None keeps each tensor's.
    """

    def __init__(self, plan: MappingPlan, files: TensorFiles, dtype: Dtype | None = None):
        self.plan = plan
        self.files = files
        self.dtype = None if dtype is None else np.dtype(dtype)
        self.keys = [key for key in files if key in plan.entries]

    @classmethod
    def checked(cls, table: KeyMapping, network: nnx.Module, files: TensorFiles, dtype: Dtype) -> Conversion:
        """Raises InputError unless the files contain exactly the network's tensors."""
        mapping_plan = plan(table, parameter_shapes(network))
        mapping_plan.check_files(files)
        return cls(mapping_plan, files, dtype)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves())

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
