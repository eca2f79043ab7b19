"""Reads Qwen2.5-VL: a folder of Transformers, or one that ``rflow convert qwen`` wrote."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2_5_vl.config import MODEL_TYPE, Qwen25VLConfig, VisionConfig, end_tokens_in, parts_of
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, abstract_qwen2_5_vl
from rflow_jax.utils.file_kinds import require_true_files
from rflow_jax.utils.json_files import check_types, naming, read_object
from rflow_jax.weights.key_mapping import KeyMapping, plan
from rflow_jax.weights.loading import ShardingFor, load_into, parameter_shapes, parameter_values
from rflow_jax.weights.mappings import qwen as names
from rflow_jax.weights.model_folder import StoredAsTheirs, is_stored, load_stored
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import write_safetensors

_TEXTS = (".json", ".jinja")
_GENERATION = "generation_config.json"
# Settings of Transformers that are not supported here, and the values that switch them off.
_UNSUPPORTED = (
    *("num_beams", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"),
    *("min_length", "min_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "exponential_decay_length_penalty"),
    *("guidance_scale", "penalty_alpha", "stop_strings"),
)
_OFF = (None, 0, 1, [], {})
log = logging.getLogger(__name__)


def read_qwen_config(folder: Path) -> Qwen25VLConfig:
    """The sizes of a model folder.

    Raises:
        InputError: no ``config.json``, or one of another network; a file is a Git LFS pointer or a web page.
    """
    require_true_files(folder)
    path = folder / "config.json"
    content = read_object(path)
    with naming(path):
        text, vision = parts_of(content)
        check_types(Qwen2Config, text, path)
        check_types(VisionConfig, vision, path)
        check_types(Qwen25VLConfig, {key: value for key, value in content.items() if value is not None}, path)
        return Qwen25VLConfig.from_json(content)


def end_tokens(folder: Path, config: Qwen25VLConfig) -> tuple[int, ...]:
    """The tokens that end a text, from ``generation_config.json`` or else ``config.json``; empty if neither has them.

    Raises:
        InputError: they are not tokens.
    """
    with naming(folder / _GENERATION):
        return end_tokens_in(_generation(folder)) or config.eos_token_ids


def repetition_penalty(folder: Path) -> float:
    """The penalty in ``generation_config.json``, by default 1 (none). Warns of settings that are not supported here.

    Raises:
        InputError: it is not a penalty.
    """
    path, content = folder / _GENERATION, _generation(folder)
    if rules := [f"{name} {content[name]!r}" for name in _UNSUPPORTED if content.get(name) not in _OFF]:
        log.warning("%s: %s is not followed here; answers may differ from Transformers'", path, ", ".join(rules))
    penalty = content.get("repetition_penalty")
    penalty = 1.0 if penalty is None else penalty
    if type(penalty) not in (int, float) or not 0 < penalty < inf:
        raise InputError(f"{path}: repetition_penalty is {penalty!r}; expected a number above 0")
    return float(penalty)


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / _GENERATION
    return read_object(path) if path.is_file() else {}


def load_qwen(
    folder: Path,
    *,
    dtype: Dtype,
    sharding_for: ShardingFor | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Qwen25VL:
    """The network with its weights on the devices.

    Args:
        dtype: of the parameters, and so of the activations.

    Raises:
        InputError: not a Qwen2.5-VL, or keys or shapes other than its own.
    """
    config = read_qwen_config(folder)
    model = abstract_qwen2_5_vl(config, dtype)
    if is_stored(folder):
        return load_stored(model, folder, dtype=dtype, sharding_for=sharding_for, on_bytes=on_bytes)
    files = TensorFiles.open(folder)
    table = names.qwen2_5_vl_mapping(files, head=model.language.head is not None)
    return load_into(model, table, files, dtype=dtype, sharding_for=sharding_for, on_bytes=on_bytes)


def open_qwen(folder: Path) -> TensorFiles:
    """The tensors of a model folder as they are published, also where ``rflow convert qwen`` wrote it.

    Raises:
        InputError: not a Qwen2.5-VL, or one that was stored by Orbax.
    """
    if not is_stored(folder):
        return TensorFiles.open(folder)
    model = abstract_qwen2_5_vl(read_qwen_config(folder))
    return StoredAsTheirs(folder, plan(published_table(model), parameter_shapes(model)))


def published_table(model: Qwen25VL) -> KeyMapping:
    """The names that published checkpoints give the network's parameters."""
    return names.qwen2_5_vl_mapping((), head=model.language.head is not None)


def nested_table(model: Qwen25VL) -> KeyMapping:
    """The names of Transformers' modules from 4.52 on."""
    return names.qwen2_5_vl_mapping((names.NESTED[0],), head=model.language.head is not None)


def published_config(config: Qwen25VLConfig, dtype: str, tokens: Mapping[str, int]) -> dict[str, Any]:
    """``config.json`` in the published layout.

    Args:
        tokens: the special tokens' ids by their names there, such as ``image_token_id``.
    """
    language, vision = asdict(config.language), asdict(config.vision)
    sections = list(language.pop("mrope_section"))
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vision_config": {"model_type": MODEL_TYPE, "hidden_act": "silu", **vision},
        **language,
        **tokens,
    }


def export_qwen(model: Qwen25VL, base: Path, folder: Path) -> None:
    """Writes a folder of Transformers: the network's parameters, and the text files of the base folder.

    Args:
        model: without adapters.
        base: the folder it was read from.
    """
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and (file.suffix in _TEXTS or file.name == "merges.txt") and ".index." not in file.name:
            shutil.copyfile(file, folder / file.name)
    mapping_plan, values = plan(published_table(model), parameter_shapes(model)), parameter_values(model)
    infos = {
        key: (np.dtype(values[targets[0].path].dtype), mapping_plan.their_shape(key))
        for key, targets in mapping_plan.entries.items()
    }
    tensors = ((key, mapping_plan.join(key, values).astype(dtype)) for key, (dtype, _) in infos.items())
    write_safetensors(folder / "model.safetensors", infos, tensors, {"format": "pt"})
