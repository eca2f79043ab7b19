"""The original's reward checkpoints, read as they are.

A folder with ``model_config.json`` and ``checkpoint-N/``, which holds either ``adapter_model.safetensors`` and
``non_lora_state_dict`` (``.pth``, or the same tensors as ``.safetensors``), or everything in ``model.pth``. The base
model is a folder that the configuration names, of Transformers or of ``convert_weights qwen``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.models.lora import attach
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.reward import RewardModel, abstract_reward_model
from rflow_jax.parallel.sharding import put_by
from rflow_jax.weights.files import TensorFiles
from rflow_jax.weights.hub import resolve_vlm
from rflow_jax.weights.layered import LayeredFiles
from rflow_jax.weights.load import ShardingFor, load_into
from rflow_jax.weights.lora.peft import ADAPTER_FILE, common_name, find_adapters, merged
from rflow_jax.weights.names.qwen2_5_vl import reward_table
from rflow_jax.weights.pickles import open_pickle
from rflow_jax.weights.qwen import open_qwen, read_qwen_config
from rflow_jax.weights.reward.config import CONFIG_FILE, RewardConfig
from rflow_jax.weights.reward.steps import find_step

SPECIAL_TOKEN = "<|VQ_reward|>"
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class RewardCheckpoint:
    """A reward model that was found, nothing of it read yet.

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
            InputError: no such checkpoint, no such base, or one that is another network.
        """
        config = RewardConfig.read(folder)
        beside = folder / config.base
        root = resolve_vlm(base) if base else beside if beside.is_dir() else resolve_vlm(config.base)
        read_qwen_config(root)  # another network is said before anything is read of it
        return cls(folder, find_step(folder, step)[1], root, config)

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer lies: with the checkpoint, or the base's."""
        own = self.step / "tokenizer"
        return own if own.is_dir() else self.step if (self.step / "tokenizer.json").is_file() else self.base

    def load(
        self,
        *,
        dtype: Any,
        merge: bool = True,
        sharding_for: ShardingFor | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> RewardModel:
        """The network with its weights on the devices.

        Args:
            dtype: of the parameters, and so of what is computed.
            merge: add the LoRA to the weights; else it is kept apart, and acts where the call says.

        Raises:
            InputError: keys or shapes that are not exactly the network's, an adapter of an unknown linear.
        """
        files = self._files()
        config = read_qwen_config(self.base)
        if _EMBEDDING not in files:
            raise InputError(f"{files.where}: {_EMBEDDING} is missing")
        config = _with_vocabulary(config, files[_EMBEDDING].shape[0])
        model = abstract_reward_model(config, self.config.outputs, dtype)
        own = self.config
        how = {"rank": own.rank, "alpha": own.alpha, "rslora": own.rslora, "said_by": f"{CONFIG_FILE} says lora_r"}
        adapters = find_adapters(files, model, reward_table(), **how)
        load_into(model, reward_table(), files, dtype=dtype, sharding_for=sharding_for, on_bytes=on_bytes)
        if adapters:
            attach(model, adapters, where=files.where, put=put_by(sharding_for) if sharding_for else None)
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
        """What is no LoRA; of two files with the same tensors the one that needs no torch."""
        for name in ("non_lora_state_dict.safetensors", "non_lora_state_dict.pth"):
            if (file := self.step / name).is_file():
                return TensorFiles.open(file) if file.suffix == ".safetensors" else open_pickle(file, allow=True)
        raise InputError(f"{self.step}: no model.pth and no non_lora_state_dict.pth (or .safetensors); no reward model")


def _with_vocabulary(config: Qwen25VLConfig, rows: int) -> Qwen25VLConfig:
    """The checkpoint's embedding has the special token, and may have lost rows that no token owned."""
    return replace(config, language=replace(config.language, vocab_size=rows))
