"""Checkpoints in fewer bits than 16: float8 with scales is read as bfloat16, other kinds are refused by their name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.weights.safetensors_header import TensorInfo

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_INTEGERS = "iub"  # NumPy's kinds, booleans among them
_PIECE = 2**20  # numbers that are scaled at once, in float32
# Beside ``weight``: ComfyUI's names, old and new, and DeepSeek's, a factor too in spite of its name.
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_BLOCK = 128  # rows and columns that share a scale, where there is one for each block
# Scales of activations, and marks that a file or a module is in float8.
_PASSED_OVER = ("scale_input", "input_scale", "output_scale", "scaled_fp8", "comfy_quant")
# The last part of a key -> the kind that has such tensors; the first kind counts.
_REFUSED = {
    "bitsandbytes__nf4": "4 bits by bitsandbytes (nf4)",
    "bitsandbytes__fp4": "4 bits by bitsandbytes (fp4)",
    "absmax": "few bits by bitsandbytes (nf4, fp4)",
    "nested_absmax": "few bits by bitsandbytes (nf4, fp4)",
    "quant_map": "few bits by bitsandbytes (nf4, fp4)",
    "SCB": "int8 by bitsandbytes",
    "weight_format": "int8 by bitsandbytes",
    "wscales": "4 bits by SVDQuant (nunchaku)",
    "wtscale": "4 bits by SVDQuant (nunchaku)",
    "qweight": "few bits by GPTQ or AWQ",
    "qzeros": "few bits by GPTQ or AWQ",
    "g_idx": "few bits by GPTQ",
    "weight_scale_2": "4 bits (nvfp4)",
    "weight_packed": "packed integers of compressed-tensors",
    "weight_zero_point": "integers of compressed-tensors",
    "_data": "few bits by quanto",
    "W_q": "few bits by HQQ",
}


def find_scales(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Key of each weight that has scales, as float8 has them -> the key of these.

    Raises:
        InputError: the tensors are in another kind of few bits.
    """
    by_leaf = {key.rpartition(".")[2]: key for key in infos}
    if leaf := next((leaf for leaf in _REFUSED if leaf in by_leaf), None):
        raise _refusal(infos, by_leaf[leaf], _REFUSED[leaf])
    scales: dict[str, str] = {}
    if not by_leaf.keys() & {*_SCALES}:
        return scales
    for key in infos:
        module, _, leaf = key.rpartition(".")
        weight = f"{module}.weight"
        if leaf in _SCALES and weight in infos:
            for one in (weight, key):
                if infos[one].dtype.kind in _INTEGERS:
                    raise _refusal(infos, one, f"{infos[one].dtype} with scales")
            _require_scale(infos[key], key, infos[weight])
            scales[weight] = key
    return scales


def as_read(infos: Mapping[str, TensorInfo], scales: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The tensors as they are given out: scaled ones in bfloat16, and none that only says how another is stored."""
    hidden = set(scales.values())
    shown = {k: i for k, i in infos.items() if k not in hidden and k.rpartition(".")[2] not in _PASSED_OVER}
    for key in scales:
        nbytes = infos[key].nbytes // infos[key].dtype.itemsize * BFLOAT16.itemsize
        shown[key] = replace(infos[key], dtype=BFLOAT16, nbytes=nbytes)
    return shown


def scaled(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``stored * scale`` in float32, rounded to bfloat16; memory holds a piece in float32.

    Args:
        scale: one number, or one for each row, or for each block of a matrix.
    """
    value = np.empty(stored.shape, BFLOAT16)
    if _is_by_block(scale.shape, stored.shape):
        with np.errstate(over="ignore", invalid="ignore"):
            for k, row in enumerate(scale.astype(np.float32)):
                some = slice(k * _BLOCK, (k + 1) * _BLOCK)
                factors = np.repeat(row, _BLOCK)[: stored.shape[1]]
                value[some] = (stored[some].astype(np.float32) * factors).astype(BFLOAT16)
        return value
    factors = scale.astype(np.float32).reshape(-1, 1)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for such numbers
        if factors.size == 1 and stored.dtype.itemsize == 1:  # each of 256 numbers once: eight times as fast
            every = np.arange(256, dtype=np.uint8).view(stored.dtype).astype(np.float32)
            table = (every * factors[0]).astype(BFLOAT16).view(np.uint16)
            np.take(table, stored.view(np.uint8), out=value.view(np.uint16), mode="clip")
            return value
        count, width = (*stored.shape[:1], 1)[0], math.prod(stored.shape[1:])
        rows, out, factors = stored.reshape(count, width), value.reshape(count, width), np.resize(factors, (count, 1))
        step = max(1, _PIECE // max(1, width))
        for start in range(0, count, step):
            some = slice(start, start + step)
            out[some] = (rows[some].astype(np.float32) * factors[some]).astype(BFLOAT16)
    return value


def _is_by_block(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether scales of this shape belong to the blocks of a matrix; one block and one row are a number, and rows."""
    blocks = tuple(-(-size // _BLOCK) for size in weight)
    return len(weight) == 2 and scale == blocks and math.prod(scale) > 1 and scale != (weight[0], 1)


def _require_scale(scale: TensorInfo, key: str, weight: TensorInfo) -> None:
    """Raises InputError unless there is one number, or one for each row or block."""
    count = math.prod(scale.shape)
    by_row = weight.shape[:1] == scale.shape[:1] == (count,) and len(scale.shape) <= 2
    if count != 1 and not by_row and not _is_by_block(scale.shape, weight.shape):
        raise InputError(
            f"{scale.file}: {key} has shape {list(scale.shape)} for a weight of {list(weight.shape)}; expected one "
            f"number, or one for each row or for each block of {_BLOCK} x {_BLOCK}"
        )


def _refusal(infos: Mapping[str, TensorInfo], key: str, name: str) -> InputError:
    return InputError(
        f"{infos[key].file}: stored in {name}, as {key} says, which is not read; take a file in bfloat16 or float8"
    )
