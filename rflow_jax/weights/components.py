"""The networks of model folders: sizes and tables of names; and CLIP as a whole from a folder of Transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.flow import Schedule
from rflow_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from rflow_jax.models.clip import Clip, ClipConfig, ClipVisionConfig, part_of
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.models.layers import abstract
from rflow_jax.models.text_encoders import ClipTextConfig, ClipTextEncoder, T5Config, T5Encoder
from rflow_jax.utils.file_kinds import require_true_files
from rflow_jax.utils.json_files import check_types, naming, read_object
from rflow_jax.weights.key_mapping import KeyMapping, plan
from rflow_jax.weights.loading import load_into, parameter_shapes
from rflow_jax.weights.mappings import autoencoder, flux, text_encoders
from rflow_jax.weights.mappings.text_encoders import CLIP_WHOLE, LOGIT_SCALE
from rflow_jax.weights.safetensors_io import TensorFiles


def read_clip_config(folder: Path) -> ClipConfig:
    """The sizes in a folder's ``config.json``; raises InputError if it is missing or not CLIP's."""
    require_true_files(folder)
    path = folder / "config.json"
    content = read_object(path)
    with naming(path):
        check_types(ClipTextConfig, part_of(content, "text"), path)
        check_types(ClipVisionConfig, part_of(content, "vision"), path)
        check_types(ClipConfig, content, path)
        return ClipConfig.from_json(content)


def check_clip_model(folder: Path) -> None:
    """Raises InputError unless a folder contains exactly CLIP's tensors."""
    _checked(folder, jnp.float32)


def load_clip_model(folder: Path, dtype: Dtype) -> Clip:
    """The network with its weights on the default device.

    Args:
        dtype: of the parameters; the scale stays float32.

    Raises:
        InputError: no such folder, another network, tensors missing, unknown or of other shapes.
    """
    network, files = _checked(folder, dtype)
    load_into(network, CLIP_WHOLE, files, dtype=dtype)
    network.logit_scale.set_value(jnp.asarray(files.read(LOGIT_SCALE), jnp.float32).reshape(()))
    return network


def _checked(folder: Path, dtype: Dtype) -> tuple[Clip, TensorFiles]:
    """The abstract network, and its checked files."""
    config, files = read_clip_config(folder), TensorFiles.open(folder)
    network = abstract(lambda rngs: Clip(config, rngs=rngs, dtype=dtype))
    plan(CLIP_WHOLE, parameter_shapes(network)).check_files(files)
    if LOGIT_SCALE not in files:
        raise InputError(f"{files.source}: {LOGIT_SCALE} missing; is it a CLIP checkpoint of this size?")
    return network, files


@dataclass(frozen=True)
class Component:
    """One network of a model folder.

    Attributes:
        folder: its subfolder, named as in diffusers' layout.
        config: the class of its sizes, with ``from_json``.
        network: the class of its module.
        table_for: (checkpoint's keys, config) -> the table of names.
    """

    folder: str
    config: Any
    network: Callable[..., nnx.Module]
    table_for: Callable[[Iterable[str], Any], KeyMapping]

    def read_config(self, root: Path) -> Any:
        """The sizes in ``root/<folder>/config.json``; raises InputError if it is missing or not this network's."""
        path = root / self.folder / "config.json"
        return self.config_of(read_object(path), path)

    def config_of(self, content: dict[str, Any], path: Path) -> Any:
        """The sizes in the content of the file ``path``; raises InputError if they are not this network's."""
        with naming(path):
            check_types(self.config, content, path)
            return self.config.from_json(content)

    def abstract(self, config: Any, dtype: Dtype = jnp.float32) -> Any:
        """The network without weights."""
        return abstract(lambda rngs: self.network(config, rngs=rngs, dtype=dtype))


TRANSFORMER = Component("transformer", FluxConfig, FluxTransformer, lambda keys, config: flux.DIFFUSERS)
VAE = Component(
    "vae",
    AutoencoderConfig,
    AutoencoderKL,
    lambda keys, config: autoencoder.autoencoder_mapping(keys, len(config.block_out_channels)),
)
CLIP = Component("text_encoder", ClipTextConfig, ClipTextEncoder, lambda keys, config: text_encoders.clip_mapping(keys))
T5 = Component("text_encoder_2", T5Config, T5Encoder, lambda keys, config: text_encoders.t5_mapping(keys))
COMPONENTS = (TRANSFORMER, VAE, CLIP, T5)


def read_schedule(root: Path) -> Schedule:
    """The schedule of a model folder; raises InputError if it is missing or of another kind."""
    path = root / "scheduler" / "scheduler_config.json"
    content = read_object(path)
    with naming(path):
        check_types(Schedule, content, path)
        return Schedule.from_json(content)
