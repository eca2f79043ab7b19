"""The four networks of a FLUX model: where each lies in a model folder, its sizes, its names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from rflow_jax.models.clip import ClipTextConfig, ClipTextEncoder
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.models.layers import abstract
from rflow_jax.models.t5 import T5Config, T5Encoder
from rflow_jax.weights.names import autoencoder, clip, flux, t5
from rflow_jax.weights.tables import Table


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
    table_for: Callable[[Iterable[str], Any], Table]

    def read_config(self, root: Path) -> Any:
        """The sizes in ``root/<folder>/config.json``; raises InputError where that is missing or not this network's."""
        return self.config.from_json(read_json(root / self.folder / "config.json"))

    def abstract(self, config: Any, dtype: Dtype = jnp.float32) -> Any:
        """The network without numbers."""
        return abstract(lambda rngs: self.network(config, rngs=rngs, dtype=dtype))


TRANSFORMER = Component("transformer", FluxConfig, FluxTransformer, lambda keys, config: flux.DIFFUSERS)
VAE = Component(
    "vae",
    AutoencoderConfig,
    AutoencoderKL,
    lambda keys, config: autoencoder.table_for(keys, len(config.block_out_channels)),
)
CLIP = Component("text_encoder", ClipTextConfig, ClipTextEncoder, lambda keys, config: clip.table_for(keys))
T5 = Component("text_encoder_2", T5Config, T5Encoder, lambda keys, config: t5.table_for(keys))
COMPONENTS = (TRANSFORMER, VAE, CLIP, T5)


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises InputError where it is missing or does not parse."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; a model folder is laid out as diffusers writes it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
