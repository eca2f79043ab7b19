"""The four networks of a FLUX model: where each lies in a model folder, its sizes, its names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.flow.schedule import Schedule
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
        path = root / self.folder / "config.json"
        return self.config_of(read_object(path), path)

    def config_of(self, content: dict[str, Any], path: Path) -> Any:
        """The sizes in the content of the file ``path``; raises InputError where they are not this network's."""
        check_types(self.config, content, path)
        return self.config.from_json(content)

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


def read_schedule(root: Path) -> Schedule:
    """The schedule of a model folder; raises InputError where it is missing or of another kind."""
    path = root / "scheduler" / "scheduler_config.json"
    content = read_object(path)
    check_types(Schedule, content, path)
    return Schedule.from_json(content)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError where it is missing, does not parse or holds something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected an object with keys")
    return content


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises InputError where it is missing or does not parse."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give a whole folder of such a model") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error


def check_types(config: type, content: Mapping[str, Any], path: Path) -> None:
    """Raises InputError for a key of ``content`` that a field of the dataclass ``config`` cannot be made of.

    Fields that are configurations themselves are not looked at: they have files, or parts of a file, of their own.
    """
    for key, kind in get_type_hints(config).items():
        if kind not in _IS or key not in content or (content[key] is None and key in _MAY_BE_NULL):
            continue
        value = content[key]
        if key == "sample_size" and isinstance(value, list):
            kind = tuple[int, ...]  # height and width
        if not _IS[kind](key, value):
            raise InputError(f"{path}: {key} is {value!r}; expected {_expected(key, kind)}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An InputError that is raised within names the file."""
    try:
        yield
    except InputError as error:
        raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error


_MAY_BE_NULL = ("shift_factor",)
_MAY_BE_ZERO = ("num_layers", "num_single_layers", "eos_token_id", "fullatt_block_indexes")
_EXPECTED = {
    bool: "true or false",
    str: "a text",
    int: "a whole number above 0",
    float: "a number",
    tuple[int, ...]: "a list of whole numbers above 0",
}


def _expected(key: str, kind: Any) -> str:
    return _EXPECTED[kind].replace("above 0", "from 0") if key in _MAY_BE_ZERO else _EXPECTED[kind]


def _is_count(key: str, value: Any) -> bool:
    return type(value) is int and value >= (0 if key in _MAY_BE_ZERO else 1)


_IS: dict[Any, Callable[[str, Any], bool]] = {
    bool: lambda key, value: type(value) is bool,
    str: lambda key, value: type(value) is str,
    int: _is_count,
    float: lambda key, value: type(value) in (int, float) and math.isfinite(value),
    tuple[int, ...]: lambda key, value: (
        type(value) is list and value != [] and all(_is_count(key, each) for each in value)
    ),
}
