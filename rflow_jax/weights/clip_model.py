"""Reads CLIP as a whole from a folder of Transformers: sizes, weights, how images are prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rflow_jax.errors import InputError
from rflow_jax.models.clip import ClipTextConfig
from rflow_jax.models.clip_vision import Clip, ClipConfig, ClipVisionConfig, part_of
from rflow_jax.models.layers import abstract
from rflow_jax.weights.components import check_types, naming, read_object
from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.load import load_into, parameter_shapes
from rflow_jax.weights.names.clip import LOGIT_SCALE, WHOLE
from rflow_jax.weights.tables import plan


def read_clip_config(folder: Path) -> ClipConfig:
    """The sizes in a folder's ``config.json``; raises InputError where it is missing or not CLIP's."""
    path = folder / "config.json"
    content = read_object(path)
    with naming(path):
        check_types(ClipTextConfig, part_of(content, "text"), path)
        check_types(ClipVisionConfig, part_of(content, "vision"), path)
        check_types(ClipConfig, content, path)
        return ClipConfig.from_json(content)


def check_clip_model(folder: Path) -> None:
    """Raises InputError unless a folder holds CLIP's tensors, all of them and no others."""
    _checked(folder, jnp.float32)


def load_clip_model(folder: Path, dtype: Any) -> Clip:
    """The network with its weights on the default device.

    Args:
        dtype: of the parameters; the scale stays float32.

    Raises:
        InputError: no such folder, another network, tensors missing, unknown or of other shapes.
    """
    network, files = _checked(folder, dtype)
    load_into(network, WHOLE, files, dtype=dtype)
    network.logit_scale.set_value(jnp.asarray(files.read(LOGIT_SCALE), jnp.float32).reshape(()))
    return network


def _checked(folder: Path, dtype: Any) -> tuple[Clip, TensorFiles]:
    """The network without numbers, and the files that fit it."""
    config, files = read_clip_config(folder), TensorFiles.open(folder)
    network = abstract(lambda rngs: Clip(config, rngs=rngs, dtype=dtype))
    plan(WHOLE, parameter_shapes(network)).check_files(files)
    if LOGIT_SCALE not in files:
        raise InputError(f"{files.where}: {LOGIT_SCALE} missing; is it a CLIP checkpoint of this size?")
    return network, files
