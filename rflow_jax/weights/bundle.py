"""A whole model in memory: four networks with their weights on the devices, tokenizers, schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rflow_jax.errors import InputError
from rflow_jax.flow.latents import PATCH
from rflow_jax.flow.schedule import Schedule
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.models.clip import ClipTextConfig
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.models.layers import LoRAScale
from rflow_jax.models.lora import attach
from rflow_jax.prompts import Tokenizers
from rflow_jax.weights import components
from rflow_jax.weights.components import COMPONENTS, read_json
from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.hub import resolve
from rflow_jax.weights.load import load_into

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float16": jnp.float16}
DISTILLED_STEPS, DISTILLED_T5_LENGTH = 4, 256  # FLUX.1-schnell
STEPS, T5_LENGTH = 30, 512  # FLUX.1-dev, as the corrector was trained and evaluated


class Graphs(NamedTuple):
    """The networks without their weights."""

    transformer: Any
    vae: Any
    clip: Any
    t5: Any


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A loaded model.

    Attributes:
        name: what it was loaded from.
        weights: ``transformer`` -> (base, LoRA), the LoRA's state empty where there is none; ``vae``, ``clip``, ``t5``.
        dtype: of the activations.
    """

    name: str
    graphs: Graphs
    weights: dict[str, Any]
    tokenizers: Tokenizers
    schedule: Schedule
    flux_config: FluxConfig
    vae_config: AutoencoderConfig
    clip_config: ClipTextConfig
    dtype: Any
    has_lora: bool = False

    @property
    def token_pixels(self) -> int:
        """Pixels a side of one image token."""
        return self.vae_config.factor * PATCH

    @property
    def clip_length(self) -> int:
        return self.clip_config.max_position_embeddings

    @property
    def default_steps(self) -> int:
        return STEPS if self.flux_config.guidance_embeds else DISTILLED_STEPS

    @property
    def default_t5_length(self) -> int:
        return T5_LENGTH if self.flux_config.guidance_embeds else DISTILLED_T5_LENGTH

    def without_lora(self) -> Bundle:
        """The same model without its adapters; shares the weights."""
        graph, _ = nnx.split(abstract_flux(self.flux_config, self.dtype))
        weights = self.weights | {"transformer": (self.weights["transformer"][0], nnx.State({}))}
        return dataclasses.replace(
            self, graphs=self.graphs._replace(transformer=graph), weights=weights, has_lora=False
        )


def load_bundle(
    model: str, *, lora: str | None, lora_alpha: float | None, dtype: str, progress: bool = True
) -> Bundle:
    """Reads a model folder; see :func:`rflow_jax.pipeline.load_pipeline` for the arguments and errors."""
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    root = resolve(model)
    kind = DTYPES[dtype]
    configs = {component.folder: component.read_config(root) for component in COMPONENTS}
    tokenizers = Tokenizers(root)
    schedule = Schedule.from_json(read_json(root / "scheduler" / "scheduler_config.json"))
    networks = _load_networks(root, configs, kind, progress)
    transformer: Any = networks[components.TRANSFORMER.folder]
    if lora is not None:
        from rflow_jax.weights.lora_files import read_lora

        attach(transformer, read_lora(lora, alpha=lora_alpha).adapters, dtype=kind, where=lora)
    flux_graph, adapters, scales, base = nnx.split(transformer, nnx.LoRAParam, LoRAScale, ...)
    parts = {
        c.folder: nnx.split(networks[c.folder]) for c in (components.VAE, components.CLIP, components.T5)
    }
    (vae_graph, vae), (clip_graph, clip), (t5_graph, t5) = parts.values()
    return Bundle(
        name=model,
        graphs=Graphs(flux_graph, vae_graph, clip_graph, t5_graph),
        weights={
            "transformer": (base, nnx.merge_state(adapters, scales)),
            "vae": vae,
            "clip": clip,
            "t5": t5,
        },
        tokenizers=tokenizers,
        schedule=schedule,
        flux_config=configs[components.TRANSFORMER.folder],
        vae_config=configs[components.VAE.folder],
        clip_config=configs[components.CLIP.folder],
        dtype=kind,
        has_lora=lora is not None,
    )


def _load_networks(root: Path, configs: dict[str, Any], dtype: Any, progress: bool) -> dict[str, nnx.Module]:
    """Every network of the folder with its weights; one bar, in bytes, over all of them."""
    files = {component.folder: TensorFiles.open(root / component.folder) for component in COMPONENTS}
    with byte_progress(progress) as bar:
        task = bar.add_task("loading", total=sum(f.nbytes for f in files.values()))
        networks = {}
        for component in COMPONENTS:
            bar.update(task, description=f"loading {component.folder}")
            networks[component.folder] = load_into(
                component.abstract(config := configs[component.folder], dtype),
                component.table_for(files[component.folder], config),
                files[component.folder],
                dtype=dtype,
                on_bytes=lambda done: bar.advance(task, done),
            )
    return networks


def byte_progress(show: bool) -> Progress:
    """A progress bar in bytes, on standard error."""
    from rich.console import Console

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not show)
