"""A FLUX for the shapes world, small enough to be trained from nothing, and model folders in diffusers' layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.autoencoder import AutoencoderConfig
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.text_encoders import ClipTextConfig, T5Config
from rflow_jax.shapes.initial import draw_parameters
from rflow_jax.shapes.scenes import SIZE
from rflow_jax.shapes.vocabulary import (
    CLIP_END,
    CLIP_LENGTH,
    CLIP_START,
    T5_LENGTH,
    clip_tokenizer,
    t5_tokenizer,
    write_tokenizers,
)
from rflow_jax.utils.json_files import read_object
from rflow_jax.weights.components import CLIP, COMPONENTS, T5, TRANSFORMER, VAE, Component
from rflow_jax.weights.convert import COPIED
from rflow_jax.weights.defaults import DEFAULTS_KEY
from rflow_jax.weights.flux import describe
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes, parameter_values
from rflow_jax.weights.model_folder import write_json
from rflow_jax.weights.published import DEV, MODEL_INDEX
from rflow_jax.weights.saving import atomic_output, save_tensors

# The model's own settings, in the names of ``SamplingConfig``.
DEFAULTS: dict[str, Any] = {
    "height": SIZE,
    "width": SIZE,
    "condition_size": SIZE,
    "num_inference_steps": 20,
    "guidance_scale": 1.0,
    "max_sequence_length": T5_LENGTH,
}
_WIDTH = 128  # of the text encoders
_STEMS = {TRANSFORMER.folder: "diffusion_pytorch_model", VAE.folder: "diffusion_pytorch_model"}
_STEM = "model"  # of Transformers' networks
_NOT_SAID = ("mlp_ratio", "rope_theta")  # by diffusers' transformer, which has FLUX.1's


@cache
def sizes() -> dict[str, Any]:
    """The configuration of each network by its folder: 13.4 million parameters, 11.1 of them the transformer's."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return {
        TRANSFORMER.folder: FluxConfig(
            num_layers=2,
            num_single_layers=6,
            attention_head_dim=64,
            num_attention_heads=4,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(8, 28, 28),
        ),
        VAE.folder: AutoencoderConfig(
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=SIZE,
            scaling_factor=1.0,  # until latents are known
            shift_factor=0.0,
            mid_block_add_attention=False,
        ),
        CLIP.folder: ClipTextConfig(
            hidden_size=_WIDTH,
            intermediate_size=3 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=clip.get_vocab_size(),
            max_position_embeddings=CLIP_LENGTH,
            eos_token_id=clip.token_to_id(CLIP_END),
        ),
        T5.folder: T5Config(
            vocab_size=t5.get_vocab_size(),
            d_model=_WIDTH,
            d_kv=_WIDTH // 4,
            d_ff=3 * _WIDTH,
            num_layers=3,
            num_heads=4,
        ),
    }


# What a parameter is multiplied with: pattern of component's folder and path -> factor. Modulations, and what ends the
# transformer, begin at zero, so that its blocks begin as the identity; other residual branches begin small. T5 has no
# factor at its scores, so its queries have it; its places begin with sharp differences, which Adam makes slowly.
_FACTORS = {
    r"transformer\.((.*\.)?mod|final_mod|final_out)\.kernel": 0.0,
    r"vae\..*\.conv2\.kernel": 0.3,
    r"vae\..*\.conv_out\.kernel": 0.5,
    r"text_encoder\.positions\.embedding": 0.3,
    r"text_encoder(_2)?\.blocks\.\d+\.(attn\.out|ff\.down)\.kernel": 0.5,
    r"text_encoder_2\.blocks\.\d+\.attn\.q\.kernel": (_WIDTH // 4) ** -0.5,
    r"text_encoder_2\.position_bias\.embedding": 2.0,
}


def new_network(component: Component, config: Any, seed: int) -> nnx.Module:
    """A network with float32 parameters to be trained from nothing; see :func:`draw_parameters`."""
    network = component.abstract(config)
    draw_parameters(network, seed, prefix=f"{component.folder}.", factors=_FACTORS)
    return network


def write_start(folder: Path, seed: int = 0) -> int:
    """Writes a new model, untrained, in float32; returns the number of its parameters.

    Raises:
        InputError: ``folder`` exists.
    """
    count = 0
    with atomic_output(folder) as partial:
        partial.mkdir()
        write_json(partial / "model_index.json", MODEL_INDEX | {DEFAULTS_KEY: DEFAULTS})
        (partial / "scheduler").mkdir()
        # FLUX.1-dev's, whose shift grows with the image: that of 36 tokens is small.
        write_json(partial / "scheduler" / "scheduler_config.json", DEV["scheduler"])
        write_tokenizers(partial)
        for component in COMPONENTS:
            config = sizes()[component.folder]
            network = new_network(component, config, seed)
            write_network(partial, component, network, their_config(component, config))
            count += sum(value.size for value in parameter_values(network).values())
    return count


def their_config(component: Component, config: Any) -> dict[str, Any]:
    """The content of a network's ``config.json`` for diffusers or Transformers.

    Raises:
        InputError: sizes that diffusers' class does not have.
    """
    own = asdict(config)
    if component is TRANSFORMER:
        default = FluxConfig()
        if any(own.pop(name) != getattr(default, name) for name in _NOT_SAID):
            raise InputError(f"transformer config: diffusers has no other {' and '.join(_NOT_SAID)} than FLUX.1's")
    if component is VAE:
        levels = len(config.block_out_channels)
        blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
        own |= {name: kind * levels for name, kind in blocks.items()}
    if component is CLIP:
        start = clip_tokenizer().token_to_id(CLIP_START)
        own |= {"bos_token_id": start, "pad_token_id": config.eos_token_id, "projection_dim": config.hidden_size}
    if component is T5:
        own |= {"num_decoder_layers": config.num_layers}
    return DEV[component.folder] | own


def write_network(
    root: Path, component: Component, network: nnx.Module, config: Mapping[str, Any], dtype: Dtype | None = None
) -> None:
    """Writes a network into its folder of ``root``, under the names of diffusers or Transformers.

    Args:
        network: with blocks in lists, and without adapters.
        config: the content of its ``config.json``.
        dtype: of what is written; None: that of the parameters.
    """
    folder = root / component.folder
    folder.mkdir(parents=True)
    names = component.table_for((), component.config.from_json(config))
    mapping, values = plan(names, parameter_shapes(network)), parameter_values(network)
    tensors = {key: mapping.join(key, values) for key in mapping.entries}
    if dtype is not None:
        tensors = {key: tensor.astype(dtype) for key, tensor in tensors.items()}
    if "torch_dtype" in config:
        (kind,) = {np.dtype(tensor.dtype).name for tensor in tensors.values()}
        config = {**config, "torch_dtype": kind}
    write_json(folder / "config.json", config)
    stem = _STEMS.get(component.folder, _STEM)
    save_tensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"})


def require_pipeline(folder: Path) -> Path:
    """The folder; raises InputError unless it is a model in diffusers' layout with all of its parts."""
    found = describe(folder)
    if found.kind != "diffusers":
        raise InputError(f"{folder}: give a folder in diffusers' layout, such as rflow shapes model writes")
    names = (*(component.folder for component in COMPONENTS), *COPIED)
    if missing := [name for name in names if not (folder / name).is_dir()]:
        raise InputError(f"{folder}: has no {', '.join(missing)}; give a whole model")
    return folder


def save_pipeline(
    folder: Path,
    networks: Mapping[str, nnx.Module],
    *,
    base: Path,
    changes: Mapping[str, Mapping[str, Any]] = {},
    defaults: Mapping[str, Any] | None = None,
    dtype: Dtype | None = None,
) -> None:
    """Writes a model in diffusers' layout: these networks, and all else as in another model.

    Args:
        networks: by their folder, such as ``vae``; with blocks in lists, and without adapters.
        base: the folder of the other model.
        changes: what differs in the ``config.json`` of a network, by its folder.
        defaults: the model's own settings of sampling; None: those of ``base``, if it has any.
        dtype: of the networks that are given; None: as they are.

    Raises:
        InputError: ``folder`` exists, or ``base`` is no such model.
    """
    require_pipeline(base)
    with atomic_output(folder) as partial:
        partial.mkdir()
        index = describe(base).info | ({} if defaults is None else {DEFAULTS_KEY: dict(defaults)})
        write_json(partial / "model_index.json", index)
        for name in COPIED:
            shutil.copytree(base / name, partial / name)
        for component in COMPONENTS:
            name = component.folder
            if name not in networks:
                shutil.copytree(base / name, partial / name)
                continue
            config = read_object(base / name / "config.json") | dict(changes.get(name, {}))
            write_network(partial, component, networks[name], config, dtype)
