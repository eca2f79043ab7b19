"""Writes checkpoints of reward models in the original's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rflow_jax.models.lora import adapters_of
from rflow_jax.models.qwen2_5_vl.model import RewardModel, SpecialTokenEmbedding
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes, parameter_values
from rflow_jax.weights.lora.peft import PREFIX, export_adapter
from rflow_jax.weights.mappings.qwen import reward_mapping
from rflow_jax.weights.reward import EMBEDDING
from rflow_jax.weights.reward_config import CONFIG_FILE, PROMPT_FILE, TOKENIZER, RewardConfig
from rflow_jax.weights.saving import atomic_output, save_tensors

TABLE, ADDED = "language.embed.embedding", "language.embed.special"
SaveTo = Callable[[Path], None]
REST = "non_lora_state_dict.safetensors"


@dataclass(frozen=True)
class RewardExport:
    """The contents of a checkpoint besides its weights.

    Attributes:
        base: folder or Hub id of the base model.
        vocabulary: rows of the embedding, with the special token.
        loss: that it was trained with.
        vision: whether the vision tower was trained.
        prompt: the template around ``$prompt``; None: the prompt alone.
    """

    config: RewardConfig
    base: str
    vocabulary: int
    loss: str
    vision: bool
    prompt: str | None = None


def export_reward(
    model: RewardModel, trained: set[str], what: RewardExport, save_tokenizer: SaveTo, step: Path
) -> None:
    """Writes ``checkpoint-N`` and, beside it, ``model_config.json``.

    Args:
        trained: dotted paths of the trained parameters, besides LoRA.
        save_tokenizer: writes the tokenizer, with the special token, into a folder.
        step: the folder ``checkpoint-N``.
    """
    adapters = adapters_of(model)
    with atomic_output(step) as partial:
        partial.mkdir()
        if adapters:
            export_adapter(adapters, reward_mapping(), what.base, partial)
        rest = {f"{PREFIX}{name}": value for name, value in _rest(model, trained, what.vocabulary).items()}
        save_tensors(partial / REST, rest, {"format": "pt"})
        save_tokenizer(partial / TOKENIZER)
    content = json.dumps(_model_config(what, lora=bool(adapters)), indent=2)
    write_file(step.parent / CONFIG_FILE, content + "\n")
    if what.prompt is not None:
        write_file(step.parent / PROMPT_FILE, what.prompt)


def _rest(model: RewardModel, trained: set[str], vocabulary: int) -> dict[str, np.ndarray]:
    """The checkpoint's trained tensors besides LoRA; the whole embedding if a row of it was trained."""
    shapes = {path: shape for path, shape in parameter_shapes(model).items() if path not in (TABLE, ADDED)}
    values = parameter_values(model)
    mapping_plan = plan(reward_mapping(), shapes)
    rest = {
        key: mapping_plan.join(key, values)
        for key, targets in mapping_plan.entries.items()
        if any(target.path in trained for target in targets)
    }
    if {TABLE, ADDED} & trained:
        embed: Any = model.language.embed
        table = rest[EMBEDDING] = np.asarray(embed.embedding[...])
        if isinstance(embed, SpecialTokenEmbedding):
            grown = rest[EMBEDDING] = np.zeros((vocabulary, table.shape[1]), table.dtype)
            grown[: len(table)] = table[:vocabulary]
            grown[embed.token] = np.asarray(embed.special[...])[0].astype(table.dtype)
    return rest


def _model_config(what: RewardExport, *, lora: bool) -> Mapping[str, Any]:
    config = what.config
    norm = {"VQ_mean": config.mean, "VQ_std": config.std}
    return {
        # The original also needs the keys of its own data.
        "data_config": {
            "meta_data": "",
            "data_dir": "",
            "max_frame_pixels": config.max_pixels,
            "prompt_template_type": config.template,
        },
        "model_config": {
            "model_name_or_path": what.base,
            "output_dim": config.outputs,
            "use_special_tokens": config.special_tokens,
            "freeze_vision_tower": not what.vision,
            "reward_token": config.token,
            "loss_type": what.loss,
        },
        "peft_lora_config": {
            "lora_enable": lora,
            "lora_namespan_exclude": ["visual", "embed_tokens", "lm_head", "rm_head"],
            "lora_r": config.rank,
            "lora_alpha": config.alpha,
            "use_rslora": config.rslora,
        },
    } | ({} if config.mean is None else {"inference_config": norm})
