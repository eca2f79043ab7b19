"""A trained reward model -> the original's checkpoint, as :mod:`rflow_jax.weights.reward.checkpoint` reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rflow_jax.files import write_file
from rflow_jax.models.lora import adapters_of
from rflow_jax.models.qwen2_5_vl.reward import RewardModel, SpecialTokenEmbedding
from rflow_jax.weights.load import parameter_shapes, parameter_values
from rflow_jax.weights.lora.peft import PREFIX, export_adapter
from rflow_jax.weights.names.qwen2_5_vl import reward_table
from rflow_jax.weights.reward.config import CONFIG_FILE, PROMPT_FILE, RewardConfig
from rflow_jax.weights.tables import plan
from rflow_jax.weights.writing import save_tensors, whole

TABLE, ADDED = "language.embed.embedding", "language.embed.special"
EMBEDDING = "model.embed_tokens.weight"
SaveTo = Callable[[Path], None]
REST, TOKENIZER = "non_lora_state_dict.safetensors", "tokenizer"


@dataclass(frozen=True)
class RewardExport:
    """What a checkpoint says besides its numbers.

    Attributes:
        base: folder or Hub id of the base model.
        vocabulary: rows of the embedding: the tokens with the special one.
        loss: that it was trained with.
        vision: whether the vision tower has moved.
        prompt: the wording around ``$prompt``; None: the prompt alone.
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
        trained: dotted paths of the parameters that have moved, besides LoRA.
        save_tokenizer: writes the tokenizer, with the special token, into a folder.
        step: the folder ``checkpoint-N``.
    """
    with whole(step) as partial:
        partial.mkdir()
        _write_step(model, trained, what, save_tokenizer, partial)
    _write_json(step.parent / CONFIG_FILE, _model_config(what, lora=bool(adapters_of(model))))
    if what.prompt is not None:
        write_file(step.parent / PROMPT_FILE, what.prompt)


def _write_step(model: RewardModel, trained: set[str], what: RewardExport, save_tokenizer: SaveTo, step: Path) -> None:
    if adapters := adapters_of(model):
        export_adapter(adapters, reward_table(), what.base, step)
    rest = {f"{PREFIX}{name}": value for name, value in _rest(model, trained, what.vocabulary).items()}
    save_tensors(step / REST, rest, {"format": "pt"})
    save_tokenizer(step / TOKENIZER)


def _rest(model: RewardModel, trained: set[str], vocabulary: int) -> dict[str, np.ndarray]:
    """The checkpoint's tensors that have moved and are no LoRA; the whole embedding where a row of it has."""
    shapes = {path: shape for path, shape in parameter_shapes(model).items() if path not in (TABLE, ADDED)}
    values = parameter_values(model)
    the_plan = plan(reward_table(), shapes)
    moved = {
        key: the_plan.join(key, values)
        for key, targets in the_plan.entries.items()
        if any(target.path in trained for target in targets)
    }
    if {TABLE, ADDED} & trained:
        moved[EMBEDDING] = _embedding(model, vocabulary)
    return moved


def _embedding(model: RewardModel, vocabulary: int) -> np.ndarray:
    embed: Any = model.language.embed
    table = np.asarray(embed.embedding[...])
    if not isinstance(embed, SpecialTokenEmbedding):
        return table
    grown = np.zeros((vocabulary, table.shape[1]), table.dtype)
    grown[: len(table)] = table[:vocabulary]
    grown[embed.token] = np.asarray(embed.special[...])[0].astype(table.dtype)
    return grown


def _model_config(what: RewardExport, *, lora: bool) -> Mapping[str, Any]:
    config = what.config
    norm = {"VQ_mean": config.mean, "VQ_std": config.std}
    return {
        # The original wants the keys of its own data, too.
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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2) + "\n")
