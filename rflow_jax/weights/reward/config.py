"""What ``model_config.json`` says of a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, get_args

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.reward import RewardToken
from rflow_jax.weights.components import read_object

CONFIG_FILE = "model_config.json"
PROMPT_FILE = "prompt.md"  # beside it, where the wording was one of the run's own


@dataclass(frozen=True)
class RewardConfig:
    """What ``model_config.json`` says; the defaults are the original's.

    Attributes:
        base: the model it was trained from: a folder or a Hub id.
        outputs: numbers a picture gets; the first is the score.
        token: whose hidden state is scored.
        special_tokens: the tokenizer has the special token, and it is the one that is scored.
        rank, alpha, rslora: of the LoRA.
        max_pixels: of a picture, before the processor sees it.
        template: the name of the prompt's wording.
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
        """From a checkpoint's folder; raises InputError where there is no ``model_config.json``, or it is unusable."""
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
            return cls(
                base=str(model["model_name_or_path"]),
                outputs=int(model.get("output_dim", cls.outputs)),
                token=_token(model, special),
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
        """The score by mean and deviation, where the configuration has both."""
        return score if self.mean is None or self.std is None else (score - self.mean) / self.std


def _token(model: Mapping[str, Any], special: bool) -> RewardToken:
    """Whose hidden state is scored: where there is a special token, its."""
    token = "special" if special else model.get("reward_token", RewardConfig.token)
    if token == "special" and not special:
        raise InputError("reward_token is 'special', but use_special_tokens is false")
    if token not in get_args(RewardToken):
        raise InputError(f"reward_token is {token!r}; expected last, mean or special")
    return token
