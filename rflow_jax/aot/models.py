"""A FLUX model's shapes in place of its weights: its sizes are read where it is, or known by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.aot.placed import on_mesh, whole_in
from rflow_jax.aot.vlm import folder_of
from rflow_jax.errors import InputError
from rflow_jax.flow.schedule import Schedule
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.models.clip import ClipTextConfig
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.graph import FluxGraph
from rflow_jax.models.layers import LoRAScale
from rflow_jax.models.lora import REFLECTION_FLOW, attach_shapes, linears, select
from rflow_jax.models.t5 import T5Config
from rflow_jax.weights import components
from rflow_jax.weights.bundle import Bundle, Graphs
from rflow_jax.weights.components import COMPONENTS, read_schedule
from rflow_jax.weights.hub import resolve_lora
from rflow_jax.weights.lora.files import read_lora

CORRECTOR_RANK = 32  # of the published corrector
# Published models, so that nothing need be fetched to compile for them.
KNOWN: dict[str, dict[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": {},
    "black-forest-labs/FLUX.1-schnell": {"guidance_embeds": False},
}


def abstract_bundle(
    model: str,
    mesh: Mesh,
    *,
    dtype: Any,
    scan_blocks: bool,
    lora: Mapping[str, int] | None = None,
    blocks: tuple[int, int] | None = None,
) -> Bundle:
    """A model of shapes, each with its place on the mesh; it has no tokenizers.

    Args:
        lora: dotted path of a linear -> the rank of its adapter, in ``dtype``.
        blocks: so many double and single blocks in place of the model's own, and as many of T5's as double ones.

    Raises:
        InputError: neither a folder nor a name that is known.
    """
    configs, schedule = read_sizes(model)
    if blocks is not None:
        flux: FluxConfig = configs[components.TRANSFORMER.folder]
        configs[components.TRANSFORMER.folder] = replace(flux, num_layers=blocks[0], num_single_layers=blocks[1])
        configs[components.T5.folder] = replace(configs[components.T5.folder], num_layers=blocks[0])
    networks = {part.folder: part.abstract(configs[part.folder], dtype) for part in COMPONENTS}
    transformer = networks.pop(components.TRANSFORMER.folder)
    if lora is not None:
        attach_shapes(transformer, fitting(lora, transformer), dtype=dtype)
    graph = FluxGraph.of(transformer, scan_blocks=scan_blocks)
    _, adapters, base = nnx.split(transformer, lambda _, v: isinstance(v, (nnx.LoRAParam, LoRAScale)), ...)
    parts = {name: nnx.split(network) for name, network in networks.items()}
    (vae_graph, vae), (clip_graph, clip), (t5_graph, t5) = (parts[c.folder] for c in COMPONENTS[1:])
    base = jax.eval_shape(graph.stacked, base)
    weights = {"vae": vae, "clip": clip, "t5": t5}
    return Bundle(
        name=model,
        graphs=Graphs(graph, vae_graph, clip_graph, t5_graph),
        weights={"transformer": (on_mesh(base, mesh), on_mesh(adapters, mesh))}
        | {name: on_mesh(state, mesh) for name, state in weights.items()},
        tokenizers=None,  # pyright: ignore[reportArgumentType] (no text is ever read)
        schedule=schedule,
        flux_config=configs[components.TRANSFORMER.folder],
        vae_config=configs[components.VAE.folder],
        clip_config=configs[components.CLIP.folder],
        dtype=dtype,
        has_lora=lora is not None,
    )


def read_sizes(model: str) -> tuple[dict[str, Any], Schedule]:
    """The configurations of a model's four networks, and its schedule; nothing is fetched.

    Raises:
        InputError: neither a folder, nor in the Hub's cache, nor known by name.
    """
    root = folder_of(model)
    if root is not None:
        return {part.folder: part.read_config(root) for part in COMPONENTS}, read_schedule(root)
    if model not in KNOWN:
        raise InputError(
            f"model {model}: no such folder, not in the Hub's cache, and its sizes are not known here as those of "
            f"{', '.join(KNOWN)} are; fetch it first (hf download {model} --include '*.json')"
        )
    sizes = FluxConfig(**KNOWN[model]), AutoencoderConfig(), ClipTextConfig(), T5Config()
    return dict(zip((part.folder for part in COMPONENTS), sizes, strict=True)), Schedule()


def corrector_ranks(lora: str | None, transformer: Any) -> dict[str, int]:
    """Ranks by linear: of a LoRA file that is there, else of the published corrector.

    Raises:
        InputError: a file that is not there.
    """
    if lora is not None and (lora.endswith(".safetensors") or Path(lora).is_absolute()) and not Path(lora).exists():
        raise InputError(f"LoRA {lora}: no such file or folder")
    if lora is not None and Path(lora).expanduser().exists():
        return {path: adapter.rank for path, adapter in read_lora(resolve_lora(lora)).adapters.items()}
    return dict.fromkeys(select(linears(transformer), REFLECTION_FLOW), CORRECTOR_RANK)


def fitting(ranks: Mapping[str, int], transformer: Any) -> dict[str, int]:
    """Those of the linears that this network has: it may have fewer blocks."""
    return {path: rank for path, rank in ranks.items() if path in linears(transformer)}


def whole_of(weights: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(network and dotted path, bytes) of the parameters of which every device holds all, largest first."""
    states = [(name, one) for name, own in weights.items() for one in (own if isinstance(own, tuple) else (own,))]
    found = [(f"{name}.{path}", nbytes) for name, state in states for path, nbytes in whole_in(state)]
    return sorted(found, key=lambda one: -one[1])
