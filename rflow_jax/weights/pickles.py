"""PyTorch's own files (``.bin``, ``.pth``), read only on request and without running what they hold."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.weights.files import TensorFiles, TensorInfo

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")


def is_pickle(path: Path) -> bool:
    """Whether the name is that of a PyTorch file."""
    return path.suffix in SUFFIXES


class PickledTensors(TensorFiles):
    """The tensors of PyTorch files, under the same interface as safetensors; their pages are mapped."""

    def __init__(self, files: Iterable[Path]):
        self.files = tuple(files)
        self.metadata = {}
        self._infos = {}
        self._tensors: dict[str, Any] = {}
        for file in self.files:
            tensors = _load(file)
            if twice := self._infos.keys() & tensors.keys():
                raise InputError(f"{file}: {min(twice)} is also in {self._infos[min(twice)].file.name}")
            self._tensors |= tensors
            self._infos |= {key: _info(file, tensor) for key, tensor in tensors.items()}

    def read(self, key: str) -> np.ndarray:
        tensor = self._tensors[key].detach().contiguous()
        info = self._infos[key]
        if info.dtype == ml_dtypes.bfloat16:
            import torch  # pyright: ignore[reportMissingImports] (an extra)

            return tensor.view(torch.int16).numpy().view(info.dtype)
        return tensor.numpy()


def open_pickle(*files: Path, allow: bool) -> PickledTensors:
    """Opens one or several PyTorch files.

    Raises:
        InputError: no such file, ``allow`` is not given, torch is not installed, or a file of something else.
    """
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such file")
    if not allow:
        raise InputError(
            f"{files[0]}: a PyTorch pickle, not read unasked; add --allow_pickle (torch then reads it with "
            "weights_only, which runs no code), or convert it to safetensors"
        )
    if importlib.util.find_spec("torch") is None:
        raise InputError(f"{files[0]}: reading a PyTorch pickle needs torch: pip install torch")
    return PickledTensors(files)


def _load(file: Path) -> dict[str, Any]:
    import pickle

    import torch  # pyright: ignore[reportMissingImports] (an extra)

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{file}: torch cannot read it as weights only ({reason})") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise InputError(f"{file}: expected a dictionary of tensors")
    return loaded


def _is_zip(file: Path) -> bool:
    with open(file, "rb") as stream:
        return stream.read(2) == b"PK"


def _info(file: Path, tensor: Any) -> TensorInfo:
    name = str(tensor.dtype).removeprefix("torch.")
    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    shape = tuple(tensor.shape)
    return TensorInfo(file, dtype, shape, 0, dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
