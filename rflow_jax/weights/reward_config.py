"""What is known of a reward model: ``model_config.json``, or what the files of a checkpoint show without it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, get_args

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import RewardToken
from rflow_jax.utils.json_files import read_object
from rflow_jax.weights.hub import STEP, HubId
from rflow_jax.weights.lora.peft import ADAPTER_CONFIG, common_name, lora_settings
from rflow_jax.weights.safetensors_io import LayeredFiles, TensorFiles

SPECIAL_TOKEN = "<|VQ_reward|>"
HEAD = "rm_head.weight"
TOKENIZER = "tokenizer"  # the folder of a checkpoint's own
log = logging.getLogger(__name__)


CONFIG_FILE = "model_config.json"
PROMPT_FILE = "prompt.md"  # beside it, if the run had its own prompt template


def find_step(folder: Path, step: int | None = None) -> tuple[int, Path]:
    """A checkpoint's number and its folder ``checkpoint-N``.

    Args:
        folder: with such folders in it, or one of them.
        step: its number; None: the latest.

    Raises:
        InputError: there is none, or none of this number.
    """
    folder = folder.absolute()
    paths = [*folder.glob("checkpoint-*")] or [folder]
    matches = [(STEP.fullmatch(path.name), path) for path in paths]
    found = {int(match[1]): path for match, path in matches if match}
    if not found:
        raise InputError(f"{folder}: no folder checkpoint-N; is it the folder of a reward model?")
    if step is not None and step not in found:
        raise InputError(f"{folder}: no checkpoint-{step}, only {', '.join(map(str, sorted(found)))}")
    number = max(found) if step is None else step
    return number, found[number]


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
        width: numbers that the head takes; None: not known.
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
    width: int | None = None

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

    def stated(self, what: Mapping[str, Any]) -> RewardConfig:
        """With some values in place of its own."""
        special = {"special_tokens": what["token"] == "special"} if "token" in what else {}
        return replace(self, **what, **special)


# The published models by the width of their language model.
_BASES = {
    2048: "Qwen/Qwen2.5-VL-3B-Instruct",
    3584: "Qwen/Qwen2.5-VL-7B-Instruct",
    5120: "Qwen/Qwen2.5-VL-32B-Instruct",
    8192: "Qwen/Qwen2.5-VL-72B-Instruct",
}
_ORIGINALS_WORDING = "detailed_special"  # of models with the special token


def inferred(step: Path, own: Sequence[TensorFiles], stated: Mapping[str, Any]) -> RewardConfig:
    """The configuration of a checkpoint without ``model_config.json``; a warning says what it was taken from.

    Args:
        step: the folder ``checkpoint-N``.
        own: its files.
        stated: what is known, by the names of :class:`RewardConfig`.

    Raises:
        InputError: the files do not show the head, the base or the strength of the LoRA.
    """
    files = LayeredFiles(own, common_name)
    if HEAD not in files:
        raise InputError(f"{step}: no {CONFIG_FILE} beside it and no {HEAD} in it; is it the folder of a reward model?")
    outputs, width = files[HEAD].shape
    content = read_object(step / ADAPTER_CONFIG) if (step / ADAPTER_CONFIG).is_file() else {}
    lora: dict[str, Any] = {}
    if any(".lora_" in key for key in files):
        if content:
            lora = lora_settings(content, step / ADAPTER_CONFIG, modules_to_save=True)
        elif "alpha" in stated:
            lora = {"rank": next(files[key].shape[0] for key in files if ".lora_" in key and "_A" in key)}
        else:
            raise InputError(f"{step}: no {CONFIG_FILE} and no {ADAPTER_CONFIG}; give the LoRA's lora_alpha")
    special = any(SPECIAL_TOKEN in text for text in _tokenizer_texts(step))
    config = RewardConfig(
        base=stated.get("base") or _base(content.get("base_model_name_or_path"), step, width),
        outputs=outputs,
        token="special" if special else "last",
        special_tokens=special,
        template=_ORIGINALS_WORDING if special else "none",
        width=width,
        **lora,
    ).stated(stated)
    scale = f", LoRA of rank {config.rank} and alpha {config.alpha:g}" if lora else ""
    log.warning(
        "%s: no %s, so taken from its files: base %s%s, %d number%s an image, scored token: %s; and assumed: pictures "
        "of %d pixels at most, the wording %s, %s. Settings for what is otherwise: base, token, lora_alpha, "
        "max_pixels, prompt_file, mean and std",
        *(step, CONFIG_FILE, config.base, scale, outputs, "s" * (outputs > 1), config.token),
        *(config.max_pixels, config.template, "scores as they are" if config.mean is None else "the given mean"),
    )
    return config


def _base(named: Any, step: Path, width: int) -> str:
    """The base model: what the adapter's file names, if it can be found by that, or else the published one."""
    if isinstance(named, str) and named:
        name = Path(named).name
        if Path(named).is_dir() or (step.parent / named).is_dir() or HubId.parse(named) is not None:
            return named
        if re.fullmatch(r"Qwen2\.5-VL-\d+B-Instruct", name):
            return f"Qwen/{name}"
    if width not in _BASES:
        raise InputError(f"{step}: its base model is not known; name it as base")
    return _BASES[width]


def _tokenizer_texts(step: Path) -> list[str]:
    names = ("added_tokens.json", "tokenizer.json", "tokenizer_config.json")
    files = [folder / name for folder in (step / TOKENIZER, step) for name in names]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
