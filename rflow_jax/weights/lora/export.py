"""Adapters -> files: diffusers' ``pytorch_lora_weights.safetensors``, and our own."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.models.lora import Adapter, adapters_of
from rflow_jax.weights.lora.metadata import METADATA_KEY
from rflow_jax.weights.lora.read import LORA_FILE, OUR_FILE
from rflow_jax.weights.mappings.flux import DIFFUSERS
from rflow_jax.weights.saving import atomic_output, save_tensors

COMPONENT = "transformer"
Source = Mapping[str, Adapter] | nnx.Module


def export_lora(source: Source, dst: str | os.PathLike[str], *, fold_alpha: bool = False) -> Path:
    """Writes adapters in diffusers' format and returns the file.

    The matrices stay as they are; alpha goes into the header as diffusers (from 0.35) writes and reads it.

    Args:
        source: adapters by our path (as :func:`read_lora` gives them), or a model that carries some.
        dst: a ``.safetensors`` file, or a folder to put ``pytorch_lora_weights.safetensors`` in.
        fold_alpha: multiply the scale into B, for readers that ignore the header.

    Raises:
        InputError: nothing to export, or the file exists.
    """
    named = {DIFFUSERS.module(path)[1]: adapter for path, adapter in _adapters(source).items()}
    if fold_alpha:
        for name, adapter in named.items():
            b = (adapter.b.astype(np.float32) * np.float32(adapter.scale)).astype(adapter.b.dtype)
            named[name] = Adapter(adapter.a, b)
    tensors: dict[str, np.ndarray] = {}
    for name, adapter in named.items():
        tensors[f"{COMPONENT}.{name}.lora_A.weight"] = adapter.a
        tensors[f"{COMPONENT}.{name}.lora_B.weight"] = adapter.b
    config = {f"{COMPONENT}.{key}": value for key, value in peft_config(named).items()}
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    return _write(tensors, metadata, Path(dst), LORA_FILE)


def save_lora(source: Source, dst: str | os.PathLike[str]) -> Path:
    """Writes adapters under our names and in our layout.

    Keys are ``<path>.lora_a`` [in, r], ``<path>.lora_b`` [r, out] and ``<path>.alpha``.

    Args:
        dst: a ``.safetensors`` file, or a folder to put ``lora.safetensors`` in.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, adapter in _adapters(source).items():
        tensors[f"{path}.lora_a"] = np.ascontiguousarray(adapter.a.T)
        tensors[f"{path}.lora_b"] = np.ascontiguousarray(adapter.b.T)
        if adapter.alpha is not None or adapter.rslora:
            tensors[f"{path}.alpha"] = np.asarray(effective_alpha(adapter), np.float64)
    return _write(tensors, {"format": "rflow_jax"}, Path(dst), OUR_FILE)


def peft_config(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """PEFT's LoraConfig for adapters by diffusers' module name, as far as it describes them.

    Patterns begin with ``^``: PEFT matches them against the end of a name, and ``proj_out`` alone would match that of
    every single block too.
    """
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    alphas = {name: effective_alpha(adapter) for name, adapter in adapters.items()}
    alphas = {name: int(alpha) if alpha.is_integer() else alpha for name, alpha in alphas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in sorted(ranks.items()) if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in sorted(alphas.items()) if value != alpha},
        "target_modules": sorted(adapters),
        "bias": "none",
        "lora_bias": False,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }


def effective_alpha(adapter: Adapter) -> float:
    """The alpha that gives this adapter's scale as alpha / rank."""
    alpha = float(adapter.rank if adapter.alpha is None else adapter.alpha)
    return alpha * math.sqrt(adapter.rank) if adapter.rslora else alpha


def _adapters(source: Source) -> Mapping[str, Adapter]:
    adapters = adapters_of(source) if isinstance(source, nnx.Module) else source
    if not adapters:
        raise InputError("no LoRA to export: the model carries none")
    return adapters


def _write(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], dst: Path, name: str) -> Path:
    file = dst if dst.suffix == ".safetensors" else dst / name
    with atomic_output(file) as partial:
        save_tensors(partial, tensors, metadata)
    return file
