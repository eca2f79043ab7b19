"""Checkpoints of reward models in the original's format: found and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax.typing import Dtype

from rflow_jax.errors import InputError
from rflow_jax.models.lora import attach
from rflow_jax.models.qwen2_5_vl.model import RewardModel, abstract_reward_model
from rflow_jax.parallel.sharding import put_by
from rflow_jax.weights.hub import resolve_vlm
from rflow_jax.weights.loading import ShardingFor, load_into
from rflow_jax.weights.lora.peft import ADAPTER_FILE, common_name, find_adapters, merged, with_merged_embedding
from rflow_jax.weights.mappings.qwen import HEAD as LANGUAGE_HEAD
from rflow_jax.weights.mappings.qwen import reward_mapping
from rflow_jax.weights.pytorch_files import open_pickle
from rflow_jax.weights.qwen import open_qwen, read_qwen_config
from rflow_jax.weights.reward_config import CONFIG_FILE, HEAD, TOKENIZER, RewardConfig, find_step, inferred
from rflow_jax.weights.safetensors_io import LayeredFiles, TensorFiles

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
    def open(
        cls,
        folder: Path,
        *,
        step: int | None = None,
        base: str | None = None,
        stated: Mapping[str, Any] | None = None,
    ) -> RewardCheckpoint:
        """Finds the checkpoint and its base.

        Args:
            folder: with ``checkpoint-N`` in it, or one of these.
            step: which ``checkpoint-N``; None: the latest.
            base: a folder or a Hub id, instead of what the configuration names.
            stated: what else is known of the model, by the names of :class:`RewardConfig`. Without a
                ``model_config.json`` the rest is taken from the checkpoint's files; a warning says what.

        Raises:
            InputError: no such checkpoint, no such base, the base is another network, or something is not known.
        """
        _, found = find_step(folder, step)
        folder = found.parent
        stated = dict(stated or {}) | ({} if base is None else {"base": base})
        place = next((one for one in (folder, found) if (one / CONFIG_FILE).is_file()), None)
        if place is None:
            config = inferred(found, _own_files(found), stated)
        else:
            config = RewardConfig.read(place).stated(stated)
        beside = folder / config.base
        root = beside if base is None and beside.is_dir() else resolve_vlm(config.base)
        sizes = read_qwen_config(root)  # fails early for another network
        if config.width not in (None, sizes.language.hidden_size):
            raise InputError(
                f"{found}: {HEAD} takes {config.width} numbers, and the base {config.base} has "
                f"{sizes.language.hidden_size}: name the right one as base"
            )
        return cls(folder, found, root, config)

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer: the checkpoint's, or the base's."""
        own = self.step / TOKENIZER
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
            merge: add the LoRA to the weights; otherwise it stays separate, and calls choose where it applies. Those of
                the embedding and of the reward head are always added; the language head and its LoRA are not in use.

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
        files = with_merged_embedding(files, EMBEDDING, **lora)
        origin = f"{CONFIG_FILE} says lora_r"
        adapters = find_adapters(files, model, reward_mapping(), **lora, origin=origin, unused=(LANGUAGE_HEAD,))
        load_into(model, reward_mapping(), files, dtype=dtype, sharding_for=sharding_for, on_bytes=on_bytes)
        if adapters:
            attach(model, adapters, source=files.source, put=put_by(sharding_for) if sharding_for else None)
        if merge:
            return merged(model)
        merged(model.reward)
        return model

    def _files(self) -> LayeredFiles:
        own = _own_files(self.step)
        layers = own if _whole(self.step) is not None else [open_qwen(self.base), *own]
        files = LayeredFiles(layers, common_name)
        if HEAD not in files:
            hint = " (only a LoRA of it)" if f"{HEAD.removesuffix('.weight')}.lora_A.weight" in files else ""
            raise InputError(f"{self.step}: {HEAD} is missing{hint}; no score can be told without it")
        return files


_WHOLE = ("model.pth", "model.safetensors", "model.safetensors.index.json")
# The tensors besides LoRA; of two files with the same tensors the one that needs no torch.
_REST = ("non_lora_state_dict.safetensors", "non_lora_state_dict.pth")


def _whole(step: Path) -> Path | None:
    """The file of a checkpoint that needs no base's weights."""
    return next((step / name for name in _WHOLE if (step / name).is_file()), None)


def _own_files(step: Path) -> list[TensorFiles]:
    """The tensors of ``checkpoint-N``, file by file; later ones take precedence.

    Raises:
        InputError: there are none, or a file cannot be read.
    """
    if (whole := _whole(step)) is not None:
        return [_open(step if whole.suffix == ".json" else whole)]
    rest = [step / name for name in _REST if (step / name).is_file()][:1]
    adapter = [step / ADAPTER_FILE] if (step / ADAPTER_FILE).is_file() else []
    if not rest + adapter:
        raise InputError(f"{step}: no model.pth and no non_lora_state_dict.pth (or .safetensors); not a reward model")
    return [_open(file) for file in rest + adapter]


def _open(file: Path) -> TensorFiles:
    return open_pickle(file, allow=True) if file.suffix == ".pth" else TensorFiles.open(file)
