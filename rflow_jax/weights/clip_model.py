"""Reads CLIP as a whole from a folder of Transformers: sizes, weights, how images are prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rflow_jax.errors import InputError
from rflow_jax.models.clip import ClipTextConfig
from rflow_jax.models.clip_vision import Clip, ClipConfig, ClipVisionConfig, part_of
from rflow_jax.models.layers import abstract
from rflow_jax.weights.components import check_types, read_object
from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.load import load_into
from rflow_jax.weights.names.clip import LOGIT_SCALE, WHOLE


def read_clip_config(folder: Path) -> ClipConfig:
    """The sizes in a folder's ``config.json``; raises InputError where it is missing or not CLIP's."""
    path = folder / "config.json"
    content = read_object(path)
    try:
        check_types(ClipTextConfig, part_of(content, "text"), path)
        check_types(ClipVisionConfig, part_of(content, "vision"), path)
        return ClipConfig.from_json(content)
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error


def load_clip_model(folder: Path, dtype: Any) -> Clip:
    """The network with its weights on the default device.

    Args:
        dtype: of the parameters; the scale stays float32.

    Raises:
        InputError: no such folder, another network, tensors missing, unknown or of other shapes.
    """
    config, files = read_clip_config(folder), TensorFiles.open(folder)
    network = load_into(abstract(lambda rngs: Clip(config, rngs=rngs, dtype=dtype)), WHOLE, files, dtype=dtype)
    if LOGIT_SCALE not in files:
        raise InputError(f"{files.where}: {LOGIT_SCALE} missing; is it a CLIP checkpoint with both of its models?")
    network.logit_scale.set_value(jnp.asarray(files.read(LOGIT_SCALE), jnp.float32).reshape(()))
    return network
