"""PyTorch's own files, read by torch as weights only, once nothing in them asks for more than the file has."""

from __future__ import annotations

import importlib.util
import pickle
import pickletools
import zipfile
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.utils.file_kinds import stand_in
from rflow_jax.utils.shown import one_line
from rflow_jax.weights.finite import require_finite
from rflow_jax.weights.safetensors_header import TensorInfo
from rflow_jax.weights.safetensors_io import TensorFiles

_LARGEST_PICKLE = 2**26  # bytes of what describes the tensors
_MOST_OPERATIONS = 2**20  # of one pickle; a tensor takes about forty
_SMALL = 2**16  # what any file may ask for, such as the number of a version
_LEGACY_PICKLES = 4  # mark, version, machine, tensors
SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
_NOT_OF_NUMPY = tuple(map(np.dtype, (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))


def is_pickle(path: Path) -> bool:
    """Whether the name is that of a PyTorch file."""
    return path.suffix in SUFFIXES


class PickledTensors(TensorFiles):
    """The tensors of PyTorch files, under the same interface as safetensors; their pages are mapped."""

    def __init__(self, files: Iterable[Path]):
        self.files = tuple(files)
        self.metadata = {}
        self._stored = {}
        self._tensors: dict[str, Any] = {}
        for file in self.files:
            tensors = _load_pickle(file)
            infos: dict[str, TensorInfo] = {}
            for key, tensor in tensors.items():
                name = str(tensor.dtype).removeprefix("torch.")
                try:
                    dtype = np.dtype(name)
                except TypeError as error:
                    raise InputError(f"{file}: {key} is stored as {name}, which is not read") from error
                nbytes = dtype.itemsize * int(np.prod(tensor.shape, dtype=np.int64))
                infos[key] = TensorInfo(file, dtype, tuple(tensor.shape), 0, nbytes)
            self._add(file, infos)
            self._tensors |= tensors
        self._show()

    def _read_stored(self, key: str) -> np.ndarray:
        tensor = self._tensors[key].detach().contiguous()
        info = self._stored[key]
        if info.dtype in _NOT_OF_NUMPY:
            import torch  # pyright: ignore[reportMissingImports] (an extra)

            same_bits = torch.int16 if info.dtype.itemsize == 2 else torch.uint8
            value = tensor.view(same_bits).numpy().view(info.dtype)
        else:
            value = tensor.numpy()
        require_finite(value, info.file, key)
        return value


def open_pickle(*files: Path, allow: bool) -> PickledTensors:
    """Opens one or several PyTorch files.

    Raises:
        InputError: no such file, ``allow`` is false, torch is not installed, or the file contains something else.
    """
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such file")
    for file in files:
        if found := stand_in(file):
            raise InputError(f"{file}: {found}")
    if not allow:
        raise InputError(
            f"{files[0]}: a PyTorch pickle, not read by default; to rflow convert add --allow_pickle (torch then reads "
            "it with weights_only, which runs no code), or convert it to safetensors"
        )
    if importlib.util.find_spec("torch") is None:
        raise InputError(f"{files[0]}: reading a PyTorch pickle needs torch: pip install torch")
    return PickledTensors(files)


def _load_pickle(file: Path) -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports] (an extra)

    with open(file, "rb") as stream:
        is_zip = stream.read(2) == b"PK"
    if fault := (_fault_of_zip if is_zip else _fault_of_pickles)(file):
        raise InputError(
            f"{file}: not read as a PyTorch file: {one_line(fault, 300)}; if it is whole, save its tensors alone"
        )
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:
        reason = one_line(error, 300) or type(error).__name__
        raise InputError(f"{file}: torch cannot read it as weights only ({reason})") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    named = isinstance(loaded, dict) and all(isinstance(key, str) for key in loaded)
    if not named or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise InputError(f"{file}: expected a dictionary of tensors by name")
    size = file.stat().st_size
    for key, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(f"{file}: {one_line(key, 100)} is a {tensor.layout} tensor on {tensor.device}; not read")
        if tensor.numel() * tensor.element_size() > size:  # one number repeated along axes of any length
            shape = list(tensor.shape)
            raise InputError(f"{file}: {one_line(key, 100)} has the shape {shape}, in a file of {size:,} bytes")
    return loaded


def _fault_of_zip(file: Path) -> str:
    """What a file of today's format asks for beyond its size; empty if nothing."""
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED for one in members):
                return "its members are compressed, as torch never writes them"
            if (declared := sum(one.file_size for one in members)) > size:
                return f"its members declare {declared:,} bytes, and the file has {size:,}"
            for one in members:
                if one.filename.endswith(".pkl"):
                    if one.file_size > _LARGEST_PICKLE:
                        return f"{one.filename} has {one.file_size:,} bytes, where {_LARGEST_PICKLE:,} are read at most"
                    with archive.open(one) as content:
                        if fault := _fault_of_pickle(content, size):
                            return fault
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"{error or type(error).__name__}"
    return ""


def _fault_of_pickles(file: Path) -> str:
    """As :func:`_fault_of_zip`, of the format before torch 1.6: pickles, and behind them the numbers."""
    with open(file, "rb") as content:
        for number in range(_LEGACY_PICKLES):
            if fault := _fault_of_pickle(content, file.stat().st_size, large=number == 0):  # the first is a mark
                return fault
    return ""


def _fault_of_pickle(content: BinaryIO | Any, size: int, large: bool = False) -> str:
    """Why a pickle is not read: a number in it, which may be a length, is above the file's size, or it is too long.

    Args:
        large: it may hold numbers above that.
    """
    operations = count()
    try:
        for _, value, position in pickletools.genops(content):
            if isinstance(value, int) and abs(value) > max(size, _SMALL) and not large:
                return f"it asks for {value:,} bytes or numbers, and the file has {size:,} bytes"
            if next(operations) > _MOST_OPERATIONS or (position or 0) > _LARGEST_PICKLE:
                return "the description of its tensors is too long"
    except (ValueError, LookupError, ArithmeticError) as error:
        return f"no pickle of tensors ({error})"
    return ""
