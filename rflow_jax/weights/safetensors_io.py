"""Safetensors files, read tensor by tensor.

The safetensors library checks the headers and locates the tensors, which are read with positioned reads into buffers
of their own and never mapped: mapped pages count as resident memory, and a 24 GB checkpoint must pass through a machine
with less. A few threads read ahead, bounded in bytes. The library's own reads take three times as long and give NumPy
no float8.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.utils.atomic_io import beneath
from rflow_jax.utils.files import is_file
from rflow_jax.utils.json_files import naming, read_object
from rflow_jax.weights.buffers import Arena, new_buffer, use_arena
from rflow_jax.weights.finite import BLOCK, Bits, not_finite, require_finite
from rflow_jax.weights.reduced_precision import as_read, find_scales, scaled
from rflow_jax.weights.safetensors_header import TensorInfo, read_header

WINDOW = 2**28  # bytes of tensors on the host at once; a larger tensor is alone
_PIECE = 2**25  # bytes that one thread reads of a large tensor, so that a narrow window still has work for all
_PIECES = 4  # threads of one such tensor


class TensorFiles(Mapping[str, TensorInfo]):
    """The tensors of one safetensors file, or of a folder's files, by key; those in float8 with scales as bfloat16.

    Attributes:
        metadata: the string pairs of the headers.
    """

    def __init__(self, files: Iterable[Path]):
        self.files: tuple[Path, ...] = tuple(files)
        self.metadata: dict[str, str] = {}
        self._stored: dict[str, TensorInfo] = {}
        for file in self.files:
            infos, metadata = read_header(file)
            self._add(file, infos)
            self.metadata |= metadata
        self._show()

    def _add(self, file: Path, infos: Mapping[str, TensorInfo]) -> None:
        """Adds a file's tensors; raises InputError for one that is in another file too."""
        if twice := self._stored.keys() & infos.keys():
            raise InputError(f"{file}: {min(twice)} is also in {self._stored[min(twice)].file.name}")
        self._stored |= infos

    def _show(self) -> None:
        """Once all tensors are there: sets those that are given out."""
        self._scales = find_scales(self._stored)
        self._infos = as_read(self._stored, self._scales)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TensorFiles:
        """Opens a ``.safetensors`` file, or a folder: by its index file if there is one, else its only file.

        Raises:
            InputError: nothing there, a shard that the index names is missing, a truncated or foreign file.
        """
        path = Path(path)
        if path.is_file():
            return cls([path])
        if not path.is_dir():
            raise InputError(f"{path}: no such file or folder")
        indexes = sorted(path.glob("*.safetensors.index.json"))
        if indexes:
            return cls(_shards(indexes[0]))
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise InputError(f"{path}: expected one .safetensors file or an index of shards, found {names}")
        return cls(found)

    def __getitem__(self, key: str) -> TensorInfo:
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def source(self) -> str:
        """The name of these tensors in a message: the file, or the folder of several."""
        first = self.files[0]
        return str(first if len(self.files) == 1 else first.parent)

    def home_of(self, key: str) -> str:
        """The file that holds a tensor, for a message."""
        return str(self._infos[key].file)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self._infos.items()}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self._infos.values())

    def read(self, key: str) -> np.ndarray:
        """One tensor, in a buffer of its own.

        Raises:
            InputError: the file ended, or a number of the tensor is NaN or infinite.
        """
        value = self._read_stored(key)
        if key in self._scales:
            value = scaled(value, self._read_stored(self._scales[key]))
            require_finite(value, self._infos[key].file, key)
        return value

    def _read_stored(self, key: str) -> np.ndarray:
        info = self._stored[key]
        buffer = new_buffer(info.nbytes)
        view = memoryview(buffer)  # pyright: ignore[reportArgumentType]
        value, size = buffer.view(info.dtype), info.dtype.itemsize
        bits = Bits(value)

        def fill(start: int) -> None:
            done, end = start, min(start + _PIECE, info.nbytes)
            while done < end:
                checked, part = done, min(done + BLOCK, end)
                while done < part:
                    got = os.preadv(file.fileno(), [view[done:part]], info.offset + done)
                    if got <= 0:
                        raise InputError(f"{info.file}: ended while {key} was read; copy the file again")
                    done += got
                if not bits.finite(checked // size, done // size):  # while the processor still has them at hand
                    raise not_finite(info.file, key)

        with open(info.file, "rb", buffering=0) as file:
            if info.nbytes <= _PIECE:
                fill(0)
            else:
                with ThreadPoolExecutor(_PIECES, thread_name_prefix="weights") as pool:
                    list(pool.map(fill, range(0, info.nbytes, _PIECE)))
        return value.reshape(info.shape)

    def stream(
        self, keys: Iterable[str] | None = None, *, threads: int = 8, ahead: int = WINDOW
    ) -> Iterator[tuple[str, np.ndarray]]:
        """(key, tensor) in the given order, read ahead by ``threads``.

        Args:
            ahead: bytes of tensors held at once, including the one that the caller has, if it releases that before it
                asks for the next. A larger tensor is alone.
        """
        waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
        in_flight = 0
        pool = ThreadPoolExecutor(threads, "weights", initializer=use_arena, initargs=(Arena(ahead),))
        with pool:
            for key in self._infos if keys is None else keys:
                size = self._infos[key].nbytes
                while waiting and in_flight + size > ahead:
                    taken = self._infos[waiting[0][0]].nbytes
                    yield _result(*waiting.popleft())
                    in_flight -= taken
                waiting.append((key, pool.submit(self.read, key)))
                in_flight += size
            while waiting:
                yield _result(*waiting.popleft())


def _result(key: str, future: Future[np.ndarray]) -> tuple[str, np.ndarray]:
    """The tensor; in a function of its own, since a local of the generator would keep it alive too long."""
    return key, future.result()


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: not an index of safetensors shards: it has no weight_map of file names")
    files: list[Path] = []
    for name in sorted(set(weight_map.values())):
        with naming(index):
            files.append(beneath(index.parent, name))
        if not is_file(files[-1]):
            raise InputError(f"{files[-1]}: missing, though {index.name} names it; fetch the whole folder")
    return files


class LayeredFiles(TensorFiles):
    """The tensors of several checkpoints under common names.

    Args:
        layers: checkpoints; later ones take precedence.
        rename: a checkpoint's key -> the common name; None leaves the tensor out.

    Raises:
        InputError: two tensors of one checkpoint with the same common name.
    """

    def __init__(self, layers: Sequence[TensorFiles], rename: Callable[[str], str | None]):
        self._layers = tuple(layers)
        self.files = tuple(file for layer in layers for file in layer.files)
        self.metadata = {}
        self._infos = {}
        self._homes: dict[str, tuple[TensorFiles, str]] = {}
        for layer in layers:
            own: dict[str, str] = {}
            for key in layer:
                if (name := rename(key)) is None:
                    continue
                if name in own:
                    raise InputError(f"{layer.source}: {own[name]} and {key} are both {name}")
                own[name] = key
            self._homes |= {name: (layer, key) for name, key in own.items()}
            self._infos |= {name: replace(layer[key]) for name, key in own.items()}

    @property
    def source(self) -> str:
        """The name of these tensors in a message: every checkpoint, in order of precedence."""
        return " and ".join(layer.source for layer in self._layers)

    def read(self, key: str) -> np.ndarray:
        files, name = self._homes[key]
        return files.read(name)
