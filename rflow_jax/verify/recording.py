"""A folder of recordings: arrays that the original computed, and the settings it computed them with."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.models.lora import attach
from rflow_jax.pipeline import Pipeline, load_pipeline
from rflow_jax.weights.components import TRANSFORMER, read_json
from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.load import load_into
from rflow_jax.weights.lora.files import read_lora

# Where arrays lie below the folder, and what is put before a file's name to tell them apart.
PLACES = (("golden", ""), ("qwen", "qwen/"), ("nvila/golden", "nvila/"))


class Recording:
    """The folder; everything about sizes, settings and tolerances is read from it.

    Raises:
        InputError: the folder is not laid out like recordings.
    """

    def __init__(self, root: Path):
        self.root = root
        if not (root / "golden" / "verify_meta.json").is_file():
            raise InputError(f"{root}: holds no recordings (golden/verify_meta.json is missing)")
        self.meta: dict[str, Any] = read_json(root / "golden" / "verify_meta.json")

    def names(self) -> list[str]:
        """The files, such as ``02_transformer_cond`` and ``nvila/rope``."""
        return [prefix + file.stem for place, prefix in PLACES for file in sorted((self.root / place).glob("*.npz"))]

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Every array of a file."""
        try:
            with np.load(self._path(name)) as data:
                return {key: data[key] for key in data.files}
        except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
            raise InputError(f"{self._path(name)}: cannot be read as .npz ({error})") from error

    def json(self, name: str) -> Any:
        """The content of ``golden/<name>.json``."""
        return read_json(self.root / "golden" / f"{name}.json")

    def is_exempt(self, array: str) -> bool:
        """Whether the metadata exempts ``file/array``; of a file in a folder, also as ``folder/array``."""
        place, *_, stage = array.split("/")
        names = {array, f"{place}/{stage}"}
        return any(fnmatch(name, pattern) for name in names for pattern in self.meta.get("exempt", {}))

    @cached_property
    def transformer(self) -> FluxTransformer:
        """The transformer without a LoRA, in float32."""
        config = TRANSFORMER.read_config(self.root / "pipeline")
        files = TensorFiles.open(self.root / "pipeline" / TRANSFORMER.folder)
        return load_into(TRANSFORMER.abstract(config), TRANSFORMER.table_for(files, config), files, dtype=jnp.float32)

    def transformer_with_lora(self, scale: float) -> FluxTransformer:
        """The transformer with the recorded LoRA at a scale of alpha / rank."""
        network = jax.tree.map(lambda leaf: leaf, self.transformer)
        rank = self.meta["lora"]["rank"]
        return attach(network, read_lora(self.lora_path, alpha=scale * rank).adapters, dtype=jnp.float32)

    @cached_property
    def corrector(self) -> FluxTransformer:
        """The transformer with the LoRA at the scale of all recordings that name no other."""
        return self.transformer_with_lora(self.meta["lora"]["scale"])

    @cached_property
    def pipeline(self) -> Pipeline:
        """The whole model with the LoRA, in float32."""
        lora = self.meta["lora"]
        return load_pipeline(
            str(self.root / "pipeline"),
            lora=str(self.lora_path),
            lora_alpha=lora["scale"] * lora["rank"],
            dtype="float32",
            progress=False,
        )

    @property
    def lora_path(self) -> Path:
        return self.root / "lora" / "pytorch_lora_weights.safetensors"

    def numbered(self, name: str, pattern: str) -> Iterator[tuple[re.Match[str], np.ndarray]]:
        """The arrays of a file whose whole name a regular expression matches."""
        for key, value in self.arrays(name).items():
            if match := re.fullmatch(pattern, key):
                yield match, value

    def _path(self, name: str) -> Path:
        place, prefix = next((p for p in reversed(PLACES) if name.startswith(p[1])), PLACES[0])
        return self.root / place / f"{name.removeprefix(prefix)}.npz"
