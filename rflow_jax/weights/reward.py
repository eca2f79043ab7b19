"""Checkpoints of reward models in the original's format: found, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, get_args

import numpy as np
from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.lora import adapters_of, attach
from rflow_jax.models.qwen2_5_vl.config import RewardToken
from rflow_jax.models.qwen2_5_vl.model import RewardModel, SpecialTokenEmbedding, abstract_reward_model
from rflow_jax.parallel.sharding import put_by
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.json_files import read_object
from rflow_jax.weights.hub import resolve_vlm
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import ShardingFor, load_into, parameter_shapes, parameter_values
from rflow_jax.weights.lora.peft import ADAPTER_FILE, PREFIX, common_name, export_adapter, find_adapters, merged
from rflow_jax.weights.mappings.qwen import reward_mapping
from rflow_jax.weights.qwen import open_qwen, read_qwen_config
from rflow_jax.weights.safetensors_io import LayeredFiles, TensorFiles, open_pickle
from rflow_jax.weights.saving import atomic_output, save_tensors


def find_step(folder: Path, step: int | None = None) -> tuple[int, Path]:
    """A checkpoint's number and its folder ``checkpoint-N``.

    Args:
        step: its number; None: the latest.

    Raises:
        InputError: there is none, or none of this number.
    """
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*")]
    found = {int(match[1]): path for match, path in matches if match}
    if not found:
        raise InputError(f"{folder}: no folder checkpoint-N; is it the folder of a reward model?")
    if step is not None and step not in found:
        raise InputError(f"{folder}: no checkpoint-{step}, only {', '.join(map(str, sorted(found)))}")
    number = max(found) if step is None else step
    return number, found[number]


CONFIG_FILE = "model_config.json"
PROMPT_FILE = "prompt.md"  # beside it, if the run had its own prompt template


@dataclass(frozen=True)
class RewardConfig:
    """The content of ``model_config.json``; the defaults are the original's.

    Attributes:
        base: the model it was trained from: a folder or a Hub id.
        outputs: numbers per image; the first is the score.
        token: whose hidden state is scored.
        special_tokens: the tokenizer has the special token, and it is the one that is scored.
        rank, alpha, rslora: of the LoRA.
        max_pixels: of an image, before the processor sees it.
        template: the name of the prompt template.
        mean, std: of the scores, to normalise them; None: not given.
    """

    base: str
    outputs: int = 1
    token: RewardToken = "last"
    special_tokens: bool = False
    rank: int = 16
    alpha: float = 32
    rslora: bool = False
    max_pixels: int = 240 * 320
    template: str = "none"
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("output_dim", self.outputs), ("lora_r", self.rank), ("max_frame_pixels", self.max_pixels)):
            if value < 1:
                raise InputError(f"{name} is {value}; expected a whole number above 0")
        for name, value, low in (("lora_alpha", self.alpha, 0), ("VQ_std", self.std, 0), ("VQ_mean", self.mean, -inf)):
            if value is not None and not low < value < inf:
                raise InputError(f"{name} is {value}; expected a number{'' if low else ' above 0'}")

    @classmethod
    def read(cls, folder: Path) -> RewardConfig:
        """From a checkpoint's folder; raises InputError without a usable ``model_config.json``."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise InputError(f"{path}: no such file; a reward model's folder holds {CONFIG_FILE} and checkpoint-N")
        content = read_object(path)
        data, model, lora, norm = (
            content.get(part) or {} for part in ("data_config", "model_config", "peft_lora_config", "inference_config")
        )
        try:
            pixels = data.get("max_frame_pixels")
            special = bool(model.get("use_special_tokens", False))
            token = "special" if special else model.get("reward_token", cls.token)
            if token == "special" and not special:
                raise InputError("reward_token is 'special', but use_special_tokens is false")
            if token not in get_args(RewardToken):
                raise InputError(f"reward_token is {token!r}; expected last, mean or special")
            return cls(
                base=str(model["model_name_or_path"]),
                outputs=int(model.get("output_dim", cls.outputs)),
                token=token,
                special_tokens=special,
                rank=int(lora.get("lora_r", cls.rank)),
                alpha=float(lora.get("lora_alpha", cls.alpha)),
                rslora=bool(lora.get("use_rslora", False)),
                max_pixels=cls.max_pixels if pixels is None else int(pixels),
                template=str(data.get("prompt_template_type") or cls.template),
                mean=None if norm.get("VQ_mean") is None else float(norm["VQ_mean"]),
                std=None if norm.get("VQ_std") is None else float(norm["VQ_std"]),
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{path}: not the configuration of a reward model ({error!r})") from error

    def normalised(self, score: float) -> float:
        """The score normalised by mean and deviation, if the configuration has both."""
        return score if self.mean is None or self.std is None else (score - self.mean) / self.std


SPECIAL_TOKEN = "<|VQ_reward|>"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class RewardCheckpoint:
    """A reward model that was found, but not read yet.

    Attributes:
        step: the folder ``checkpoint-N``.
        base: the folder of the base model.
    """

    folder: Path
    step: Path
    base: Path
    config: RewardConfig

    @classmethod
    def open(cls, folder: Path, *, step: int | None = None, base: str | None = None) -> RewardCheckpoint:
        """Finds the checkpoint and its base.

        Args:
            step: which ``checkpoint-N``; None: the latest.
            base: a folder or a Hub id, instead of what the configuration names.

        Raises:
            InputError: no such checkpoint, no such base, or the base is another network.
        """
        config = RewardConfig.read(folder)
        beside = folder / config.base
        root = resolve_vlm(base) if base else beside if beside.is_dir() else resolve_vlm(config.base)
        read_qwen_config(root)  # fails early for another network
        return cls(folder, find_step(folder, step)[1], root, config)

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: the checkpoint's, or the base's."""
        own = self.step / "tokenizer"
        return own if own.is_dir() else self.step if (self.step / "tokenizer.json").is_file() else self.base

    def load(
        self,
        *,
        dtype: Dtype,
        merge: bool = True,
        sharding_for: ShardingFor | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> RewardModel:
        """The network with its weights on the devices.

        Args:
            dtype: of the parameters, and so of what is computed.
            merge: add the LoRA to the weights; otherwise it stays separate, and calls choose where it applies.

        Raises:
            InputError: keys or shapes other than the network's, an adapter of an unknown linear.
        """
        files = self._files()
        sizes, config = read_qwen_config(self.base), self.config
        if EMBEDDING not in files:
            raise InputError(f"{files.source}: {EMBEDDING} is missing")
        # The checkpoint's embedding has the special token, and may lack rows that no token owned.
        sizes = replace(sizes, language=replace(sizes.language, vocab_size=files[EMBEDDING].shape[0]))
        model = abstract_reward_model(sizes, config.outputs, dtype)
        lora = {"rank": config.rank, "alpha": config.alpha, "rslora": config.rslora}
        adapters = find_adapters(files, model, reward_mapping(), **lora, origin=f"{CONFIG_FILE} says lora_r")
        load_into(model, reward_mapping(), files, dtype=dtype, sharding_for=sharding_for, on_bytes=on_bytes)
        if adapters:
            attach(model, adapters, source=files.source, put=put_by(sharding_for) if sharding_for else None)
        return merged(model) if merge else model

    def _files(self) -> LayeredFiles:
        whole = self.step / "model.pth"
        if whole.is_file():
            return LayeredFiles([open_pickle(whole, allow=True)], common_name)
        adapter = self.step / ADAPTER_FILE
        layers = [open_qwen(self.base), self._rest()]
        if adapter.is_file():
            layers.append(TensorFiles.open(adapter))
        return LayeredFiles(layers, common_name)

    def _rest(self) -> TensorFiles:
        """The tensors besides LoRA; of two files with the same tensors the one that needs no torch."""
        for name in ("non_lora_state_dict.safetensors", "non_lora_state_dict.pth"):
            if (file := self.step / name).is_file():
                return TensorFiles.open(file) if file.suffix == ".safetensors" else open_pickle(file, allow=True)
        raise InputError(
            f"{self.step}: no model.pth and no non_lora_state_dict.pth (or .safetensors); not a reward model"
        )


TABLE, ADDED = "language.embed.embedding", "language.embed.special"
SaveTo = Callable[[Path], None]
REST, TOKENIZER = "non_lora_state_dict.safetensors", "tokenizer"


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
