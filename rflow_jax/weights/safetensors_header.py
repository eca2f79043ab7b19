"""The header of a safetensors file, checked as the format demands: every byte of the file belongs to one tensor."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.utils.file_kinds import mistaken_for_weights
from rflow_jax.utils.json_files import key_given_twice

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_METADATA = "__metadata__"
_LENGTH = 8  # bytes of the number in front of the header
_LONGEST = 100_000_000  # bytes of a header, by the format
_LONGEST_KEY = 2000  # letters: far above any name, and no work for regular expressions
_LARGEST = 2**48  # of a count: far above any file, and no work for Python's whole numbers
_AXES = 64  # that NumPy allows
_SHOWN = 300  # letters of a message that a file may choose


@dataclass(frozen=True)
class TensorInfo:
    """Location and type of one tensor."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(location and type of each tensor, in the order of the file; the metadata).

    Raises:
        InputError: another kind of file, a header that the format forbids, or a type that is not read.
    """
    try:
        return _checked(file)
    except _Fault as fault:
        if found := mistaken_for_weights(file):
            raise InputError(f"{file}: not a safetensors file, but {found}") from fault
        what = "".join(letter if letter.isprintable() else "?" for letter in str(fault)[:_SHOWN])
        raise InputError(f"{file}: not a safetensors file, or cut short ({what}); copy or download it again") from fault


class _Fault(Exception):
    """What is wrong with a header."""


def _checked(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    content, data = _content(file)
    size = file.stat().st_size - data
    metadata = content.pop(_METADATA, None) or {}
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise _Fault(f"{_METADATA} is not an object of texts")
    if longest := max((key for key in content if len(key) > _LONGEST_KEY), key=len, default=""):
        raise _Fault(f"a name of {len(longest)} letters")
    ranges = {key: _range(key, entry) for key, entry in content.items()}
    infos: dict[str, TensorInfo] = {}
    done, before = 0, "the header"
    for key, (start, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if end > size:
            raise _Fault(f"{key} ends at byte {end} of {size}")
        if start != done:
            raise _Fault(f"between {before} and {key} is a gap" if start > done else f"{before} and {key} overlap")
        name, shape = content[key]["dtype"], tuple(content[key]["shape"])
        if name not in DTYPES:
            raise InputError(f"{file}: {key} is stored as {name}, which is not read; take a file in BF16 or F32")
        if (needed := DTYPES[name].itemsize * math.prod(shape)) != end - start:
            raise _Fault(f"{key} has {end - start} bytes, but {name} {list(shape)} takes {needed}")
        infos[key] = TensorInfo(file, DTYPES[name], shape, data + start, end - start)
        done, before = end, key
    if done != size:
        raise _Fault(f"{size - done} bytes after {before} belong to no tensor")
    return infos, metadata


def _content(file: Path) -> tuple[dict[str, Any], int]:
    """(the header's content, where the tensors begin)."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        prefix = opened.read(_LENGTH)
        if len(prefix) < _LENGTH:
            raise _Fault(f"only {size} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_LONGEST, size - _LENGTH):
            raise _Fault(f"a header of {length} bytes in a file of {size}; the format allows {_LONGEST}")
        text = opened.read(length)
    if not text.startswith(b"{"):
        raise _Fault("no header")
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _Fault(f"a header that does not parse: {error}") from error
    return content, _LENGTH + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are distinct."""
    if (twice := key_given_twice(pairs)) is not None:
        raise _Fault(f"{twice} stands in the header twice")
    return dict(pairs)


def _range(key: str, entry: Any) -> tuple[int, int]:
    """(first byte, last byte + 1) of a tensor, from the start of all tensors."""
    if type(entry) is not dict or type(entry.get("dtype")) is not str:
        raise _Fault(f"{key} has no dtype")
    shape, span = entry.get("shape"), entry.get("data_offsets")
    if not _are_counts(shape) or len(shape) > _AXES:
        raise _Fault(f"{key} has the shape {shape!r}")
    if not _are_counts(span) or len(span) != 2 or span[0] > span[1]:
        raise _Fault(f"{key} has the range {span!r}")
    return span[0], span[1]


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return type(values) is list and all(type(value) is int and 0 <= value < _LARGEST for value in values)
