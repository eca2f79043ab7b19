"""Shapes in place of the weights of vision-language models: sizes are read where a model is, and else known by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.models.nvila.config import NvilaConfig
from rflow_jax.models.quantized import Quantization, quantize
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2_5_vl.config import MROPE_SECTION, Qwen25VLConfig, VisionConfig
from rflow_jax.models.siglip import SiglipVisionConfig
from rflow_jax.vlm.qwen_images import ImageRules
from rflow_jax.vlm.qwen_prepare import read_rules
from rflow_jax.weights.hub import cached
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
_QWEN_RULES = ImageRules(max_pixels=12_845_056)  # of the published models


def folder_of(model: str) -> Path | None:
    """Where a model is on this machine, a folder or in the Hub's cache; nothing is fetched."""
    path = Path(model).expanduser()
    return path if path.is_dir() else cached(model)


def read_qwen_sizes(model: str, layers: int | None = None) -> tuple[Qwen25VLConfig, ImageRules]:
    """A Qwen2.5-VL's sizes, and how its pictures are prepared.

    Args:
        layers: so many of the language model and of the vision tower, in place of its own.

    Raises:
        InputError: neither a folder, nor in the Hub's cache, nor known by name.
    """
    folder = folder_of(model)
    if folder is None:
        config, rules = _known(KNOWN_QWEN, model), _QWEN_RULES
    else:
        config = read_qwen_config(folder)
        rules = read_rules(folder, config)
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


def in_8_bits(model: Model, how: Quantization | None, pattern: str = r".*") -> Model:
    """An abstract network with the shapes that :func:`rflow_jax.models.quantized.quantize` gives its kernels."""
    return model if how is None else nnx.eval_shape(lambda model: quantize(model, how, pattern), model)


def _known(sizes: dict[str, Known], model: str) -> Known:
    name = model.partition("@")[0]
    if name not in sizes:
        raise InputError(
            f"model {model}: no such folder, not in the Hub's cache, and its sizes are not known here as those of "
            f"{', '.join(sizes)} are; fetch it first (hf download {name} --include '*.json')"
        )
    return sizes[name]
