"""GGUF files of FLUX transformers and T5 encoders, whose quantized tensors are given out in bfloat16."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.utils.file_kinds import stand_in
from rflow_jax.utils.shown import one_line
from rflow_jax.weights.finite import require_finite
from rflow_jax.weights.gguf_header import fault_of_header
from rflow_jax.weights.pytorch_files import is_pickle, open_pickle
from rflow_jax.weights.safetensors_header import TensorInfo
from rflow_jax.weights.safetensors_io import TensorFiles

_MAGIC = b"GGUF"
_PIECE = 2**20  # numbers that are dequantized at once, in float32
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def open_file(path: Path, *, allow_pickle: bool = False) -> TensorFiles:
    """Opens one file of any kind: safetensors, GGUF, or PyTorch's own if that is allowed."""
    if is_pickle(path):
        return open_pickle(path, allow=allow_pickle)
    return GgufFiles(path) if is_gguf(path) else TensorFiles.open(path)


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its name or its first bytes."""
    if path.suffix == ".gguf" or not path.is_file():
        return path.is_file()
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class GgufFiles(TensorFiles):
    """The tensors of a GGUF file, under the same interface as safetensors; its pages are mapped.

    Attributes:
        architecture: that the file names, such as ``flux``; empty if it names none.

    Raises:
        InputError: ``gguf`` is not installed, a damaged file, or a type that this package cannot dequantize.
    """

    def __init__(self, file: Path):
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"{file}: reading GGUF needs the package gguf: pip install 'rflow_jax[gguf]'")
        import gguf

        reader = _reader(file)
        self.files, self.metadata = (file,), {}
        field = reader.get_field("general.architecture")
        self.architecture = str(field.contents()) if field else ""
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._infos: dict[str, TensorInfo] = {}
        for key, tensor in self._tensors.items():
            kind = tensor.tensor_type
            if not _is_known(kind):
                raise InputError(
                    f"{file}: {key} is stored as {kind.name}, which the package gguf does not read; take a file in Q8_0"
                )
            shape = tuple(map(int, reversed(tensor.shape)))  # GGUF counts axes from the last
            self._infos[key] = TensorInfo(file, BFLOAT16, shape, 0, int(tensor.n_elements) * BFLOAT16.itemsize)
        self._dequantize: Callable[[np.ndarray, Any], np.ndarray] = gguf.quants.dequantize

    def read(self, key: str) -> np.ndarray:
        """One tensor in bfloat16; raises InputError if a number of it is NaN or infinite."""
        tensor, info = self._tensors[key], self._infos[key]
        value = np.empty(info.shape, BFLOAT16)
        stored = tensor.data.reshape(-1, tensor.data.shape[-1] if tensor.data.ndim else 1)
        out = value.reshape(len(stored), -1)
        step = max(1, _PIECE // max(1, out.shape[1]))
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, len(stored), step):
                out[start : start + step] = self._dequantize(stored[start : start + step], tensor.tensor_type)
        require_finite(value, info.file, key)
        return value


def _reader(file: Path) -> Any:
    import gguf

    if found := stand_in(file):
        raise InputError(f"{file}: {found}")
    if fault := fault_of_header(file):
        raise _damaged(file, fault)
    try:
        with np.errstate(over="ignore"):
            reader = gguf.GGUFReader(file)
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        what = str(error).strip().splitlines()
        raise _damaged(file, what[0] if what else type(error).__name__) from error
    if reader.byte_order != "I":
        raise InputError(f"{file}: a GGUF file of another byte order; take one in little endian")
    return reader


def _damaged(file: Path, what: str) -> InputError:
    return InputError(f"{file}: not a GGUF file, or cut short ({one_line(what, 300)}); copy or download it again")


def _is_known(kind: Any) -> bool:
    """Whether the package dequantizes tensors of this type."""
    import gguf

    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return True
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
