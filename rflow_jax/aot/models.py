"""Abstract models: their sizes are read from the model's folder or the Hub's cache, or else known by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.typing import Dtype
from jax.sharding import Mesh

from rflow_jax.aot.program import on_mesh, whole_in
from rflow_jax.errors import InputError
from rflow_jax.flow import Schedule
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxGraph
from rflow_jax.models.layers import LoRAScale
from rflow_jax.models.lora import attach_shapes, linears, select
from rflow_jax.models.nvila import NvilaConfig
from rflow_jax.models.options import CORRECTOR_TARGET_MODULES
from rflow_jax.models.quantization import Quantization, quantize
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2_5_vl.config import MROPE_SECTION, Qwen25VLConfig, VisionConfig
from rflow_jax.models.siglip import SiglipVisionConfig
from rflow_jax.models.text_encoders import ClipTextConfig, T5Config
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, read_image_processor_config
from rflow_jax.weights import components
from rflow_jax.weights.components import COMPONENTS, read_schedule
from rflow_jax.weights.defaults import SamplingDefaults
from rflow_jax.weights.flux import FluxModel, GraphDefs, defaults_of, describe
from rflow_jax.weights.hub import cached, resolve_lora
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.weights.nvila import read_nvila_config
from rflow_jax.weights.qwen import read_qwen_config

Model = TypeVar("Model", bound=nnx.Module)
Known = TypeVar("Known")
QWEN_7B = "Qwen/Qwen2.5-VL-7B-Instruct"
NVILA_LITE_2B = "Efficient-Large-Model/NVILA-Lite-2B-Verifier"
# Published models, so that nothing need be fetched to compile for them.
KNOWN_QWEN = {
    QWEN_7B: Qwen25VLConfig(),
    "Qwen/Qwen2.5-VL-3B-Instruct": Qwen25VLConfig(
        Qwen2Config(151_936, 2048, 11_008, 36, 16, 2, tie_word_embeddings=True, mrope_section=MROPE_SECTION),
        VisionConfig(out_hidden_size=2048),
    ),
}
KNOWN_NVILA = {
    NVILA_LITE_2B: NvilaConfig(
        SiglipVisionConfig(),
        Qwen2Config(151_648, 1536, 8960, 28, 12, 2, tie_word_embeddings=True, max_position_embeddings=32_768),
    )
}
_QWEN_RULES = ImageProcessorConfig(max_pixels=12_845_056)  # of the published models
CORRECTOR_RANK = 32  # of the published corrector
KNOWN_FLUX: dict[str, dict[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": {},
    "black-forest-labs/FLUX.1-schnell": {"guidance_embeds": False},
}


def folder_of(model: str) -> Path | None:
    """A model's folder on this machine, given or in the Hub's cache; nothing is fetched."""
    path = Path(model).expanduser()
    return path if path.is_dir() else cached(model)


def read_qwen_sizes(model: str, layers: int | None = None) -> tuple[Qwen25VLConfig, ImageProcessorConfig]:
    """A Qwen2.5-VL's sizes, and the configuration of its image processor.

    Args:
        layers: of the language model and of the vision tower, in place of its own number.

    Raises:
        InputError: neither a folder, nor in the Hub's cache, nor known by name.
    """
    folder = folder_of(model)
    if folder is None:
        config, rules = _known(KNOWN_QWEN, model), _QWEN_RULES
    else:
        config = read_qwen_config(folder)
        rules = read_image_processor_config(folder, config)
    if layers is not None:
        vision = replace(config.vision, depth=layers, fullatt_block_indexes=(layers - 1,))
        config = replace(config, language=replace(config.language, num_hidden_layers=layers), vision=vision)
    return config, rules


def read_nvila_sizes(model: str, layers: int | None = None) -> NvilaConfig:
    """NVILA's sizes; arguments and errors as those of :func:`read_qwen_sizes`."""
    folder = folder_of(model)
    config = _known(KNOWN_NVILA, model) if folder is None else read_nvila_config(folder)
    if layers is None:
        return config
    vision, language = (replace(part, num_hidden_layers=layers) for part in (config.vision, config.language))
    return replace(config, vision=vision, language=language)


def in_8_bits(model: Model, kind: Quantization | None, pattern: str = r".*") -> Model:
    """An abstract network with the shapes that :func:`rflow_jax.models.quantization.quantize` gives its kernels."""
    return model if kind is None else nnx.eval_shape(lambda model: quantize(model, kind, pattern), model)


def _known(sizes: dict[str, Known], model: str) -> Known:
    name = model.partition("@")[0]
    if name not in sizes:
        raise InputError(
            f"model {model}: no such folder, not in the Hub's cache, and its sizes are not known here as those of "
            f"{', '.join(sizes)} are; fetch it first (hf download {name} --include '*.json')"
        )
    return sizes[name]


def abstract_bundle(
    model: str,
    mesh: Mesh,
    *,
    dtype: Dtype,
    scan_blocks: bool,
    lora: Mapping[str, int] | None = None,
    blocks: tuple[int, int] | None = None,
) -> FluxModel:
    """A FLUX model of shapes with shardings, without tokenizers.

    Args:
        lora: dotted path of a linear -> the rank of its adapter, in ``dtype``.
        blocks: numbers of double and single blocks in place of the model's own; T5 gets as many as double ones.

    Raises:
        InputError: as :func:`read_sizes`.
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
    states = {"vae": vae, "clip": clip, "t5": t5}
    return FluxModel(
        name=model,
        graphs=GraphDefs(graph, vae_graph, clip_graph, t5_graph),
        weights={"transformer": (on_mesh(base, mesh), on_mesh(adapters, mesh))}
        | {name: on_mesh(state, mesh) for name, state in states.items()},
        tokenizers=None,  # pyright: ignore[reportArgumentType] (no text is ever read)
        schedule=schedule,
        flux_config=configs[components.TRANSFORMER.folder],
        vae_config=configs[components.VAE.folder],
        clip_config=configs[components.CLIP.folder],
        dtype=dtype,
        defaults=read_defaults(model, configs[components.TRANSFORMER.folder]),
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
    flux = FluxConfig(**_known(KNOWN_FLUX, model))
    sizes = flux, AutoencoderConfig(), ClipTextConfig(), T5Config()
    return dict(zip((part.folder for part in COMPONENTS), sizes, strict=True)), Schedule()


def read_defaults(model: str, config: FluxConfig) -> SamplingDefaults:
    """How a model generates unless told otherwise; raises InputError if what its folder says is not usable."""
    root = folder_of(model)
    if root is not None:
        return defaults_of(describe(root), config)
    return SamplingDefaults.of_model({}, guidance_embeds=config.guidance_embeds, source=model)


def corrector_ranks(lora: str | None, transformer: Any) -> dict[str, int]:
    """Ranks by linear: of an existing LoRA file, else of the published corrector.

    Raises:
        InputError: the file does not exist.
    """
    if lora is not None and (lora.endswith(".safetensors") or Path(lora).is_absolute()) and not Path(lora).exists():
        raise InputError(f"LoRA {lora}: no such file or folder")
    if lora is not None and Path(lora).expanduser().exists():
        return {path: adapter.rank for path, adapter in read_lora(resolve_lora(lora)).adapters.items()}
    return dict.fromkeys(select(linears(transformer), CORRECTOR_TARGET_MODULES), CORRECTOR_RANK)


def fitting(ranks: Mapping[str, int], transformer: Any) -> dict[str, int]:
    """The ranks of the linears that this network has: it may have fewer blocks."""
    return {path: rank for path, rank in ranks.items() if path in linears(transformer)}


def whole_of(weights: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(network and dotted path, bytes) of the fully replicated parameters, largest first."""
    states = [(name, one) for name, own in weights.items() for one in (own if isinstance(own, tuple) else (own,))]
    found = [(f"{name}.{path}", nbytes) for name, state in states for path, nbytes in whole_in(state)]
    return sorted(found, key=lambda one: -one[1])
