"""Parameters as an Orbax checkpoint, written and read with a bounded window of tensors on the host."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype
from orbax.checkpoint import type_handlers

from rflow_jax.errors import InputError
from rflow_jax.weights.finite import not_finite
from rflow_jax.weights.safetensors_io import WINDOW
from rflow_jax.weights.saving import Conversion, Leaf, OnBytes, in_windows


@dataclass(frozen=True)
class DeferredLeaf:
    """A leaf of the tree to be saved, which is read when its turn comes."""

    leaf: Leaf
    read: Callable[[], np.ndarray]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def size(self) -> int:  # needed by versions before 0.12.4
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype


class DeferredLeafHandler(type_handlers.NumpyHandler):
    """Saves :class:`DeferredLeaf` leaves as numpy arrays, a window at a time.

    Orbax's own handlers want the whole tree in memory before the first byte is written.
    """

    def __init__(self, on_bytes: OnBytes | None = None):
        super().__init__()
        self._on_bytes = on_bytes

    async def serialize(self, values: Sequence[Any], infos: Sequence[Any], args: Any = None) -> list[Any]:
        waiting: deque[tuple[Any, int]] = deque()
        in_flight = 0
        try:
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                while waiting and in_flight + value.leaf.nbytes > WINDOW:
                    in_flight -= await self._finish(*waiting.popleft())
                futures = await super().serialize([value.read()], [info], [arg])
                waiting.append((futures, value.leaf.nbytes))
                in_flight += value.leaf.nbytes
        finally:  # after an error too: what is still being written could not be removed
            while waiting:
                await self._finish(*waiting.popleft())
        return []

    async def _finish(self, futures: Sequence[Any], nbytes: int) -> int:
        for future in futures:
            await asyncio.to_thread(future.result)
        if self._on_bytes:
            self._on_bytes(nbytes)
        return nbytes


def save_orbax(conversion: Conversion, folder: Path, *, on_bytes: OnBytes | None = None) -> None:
    """Writes every parameter of a conversion as one Orbax PyTree, nested along our dotted paths."""
    read = lru_cache(maxsize=1)(conversion.read)  # most parts of a fused tensor follow one another
    owner = {target.path: key for key in conversion.keys for target in conversion.plan.entries[key]}
    tree = {
        tuple(leaf.path.split(".")): DeferredLeaf(leaf, lambda path=leaf.path: read(owner[path])[path])
        for leaf in conversion.leaves()
    }
    registry = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler()), (DeferredLeaf, DeferredLeafHandler(on_bytes))
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with _os_errors(folder), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(unflatten_dict(tree)))


@contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    """Turns file errors back into ``OSError``: TensorStore reports a full disk as a ``ValueError``.

    Orbax's log is silenced meanwhile: it would print the traceback of what it also raises.
    """
    log = logging.getLogger("absl")
    before, log.disabled = log.disabled, True
    try:
        yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
        raise
    finally:
        log.disabled = before


def orbax_leaves(folder: Path) -> dict[str, Leaf]:
    """Our dotted path -> the stored leaf; raises InputError without a complete Orbax checkpoint."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: no Orbax checkpoint, or an incomplete one; convert again") from error
    stored: dict[str, Any] = flatten_dict(tree, sep=".")
    return {path: Leaf(path, np.dtype(meta.dtype), tuple(meta.shape)) for path, meta in stored.items()}


def read_orbax(
    folder: Path,
    leaves: Sequence[Leaf],
    shardings: Sequence[jax.sharding.Sharding],
    dtype: Dtype | None = None,
    window_bytes: int = WINDOW,
) -> Iterator[tuple[Leaf, jax.Array]]:
    """Every leaf on its devices, read a window at a time; raises InputError if a number is NaN or infinite."""
    sharding_of = {leaf.path: sharding for leaf, sharding in zip(leaves, shardings, strict=True)}
    with _os_errors(folder), ocp.PyTreeCheckpointer() as checkpointer:
        for window in in_windows(leaves, window_bytes):
            item = {tuple(leaf.path.split(".")): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in window}
            args = {
                tuple(leaf.path.split(".")): ocp.ArrayRestoreArgs(
                    restore_type=jax.Array, sharding=sharding_of[leaf.path], dtype=jnp.dtype(dtype or leaf.dtype)
                )
                for leaf in window
            }
            restore = ocp.args.PyTreeRestore(
                item=unflatten_dict(item), restore_args=unflatten_dict(args), partial_restore=True
            )
            found: dict[str, Any] = flatten_dict(checkpointer.restore(folder.absolute(), args=restore), sep=".")
            for leaf in window:
                if not _all_finite(found[leaf.path]):
                    raise not_finite(folder, leaf.path)
                yield leaf, found[leaf.path]


def _all_finite(value: jax.Array) -> bool:
    """Whether this process's part of an array is finite; each device looks at its own, and waits for no other."""
    parts = {str(shard.index): shard.data for shard in value.addressable_shards}  # of equal ones just one
    return all(map(bool, [_finite(part) for part in parts.values()]))


@jax.jit
def _finite(part: jax.Array) -> jax.Array:
    return jnp.isfinite(part).all()
