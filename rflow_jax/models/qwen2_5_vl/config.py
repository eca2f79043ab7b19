"""Sizes of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2.config import Qwen2Config

MODEL_TYPE = "qwen2_5_vl"
MROPE_SECTION = (16, 24, 24)  # of the published sizes
# The defaults of Transformers for values missing in config.json that are not those of the published sizes.
_DEFAULTS: dict[str, Any] = {"hidden_size": 3584}
_COUNTS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "window_size",
    "out_hidden_size",
)
_TOKENS = ("image_token_id", "vision_start_token_id", "video_token_id")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower, in the names of ``vision_config``; the defaults are those of Qwen2.5-VL-7B.

    Attributes:
        window_size: pixels a side of the window within which most blocks attend.
        fullatt_block_indexes: the blocks that attend over the whole picture.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"vision config: {name} is {getattr(self, name)}; expected a number above 0")
        if self.hidden_size % (4 * self.num_heads):
            raise InputError(
                f"vision config: hidden_size {self.hidden_size} does not give {self.num_heads} heads of a width that "
                "rows and columns can share"
            )
        if self.window_units < 1:
            raise InputError(f"vision config: window_size {self.window_size} is smaller than a merged patch")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers of one patch: channels, frames, rows and columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def unit(self) -> int:
        """Patches that become one token of the language model."""
        return self.spatial_merge_size**2

    @property
    def window_units(self) -> int:
        """Units a side of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> VisionConfig:
        """From the content of ``vision_config``; raises InputError for another network."""
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"vision config: hidden_act {config['hidden_act']!r}; Qwen2.5-VL has 'silu'")
        known = _DEFAULTS | {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        if "fullatt_block_indexes" in known:
            known["fullatt_block_indexes"] = tuple(known["fullatt_block_indexes"])
        return cls(**known)


@dataclass(frozen=True)
class Qwen25VLConfig:
    """Sizes of the whole model, and the tokens of pictures; the defaults are those of Qwen2.5-VL-7B."""

    language: Qwen2Config = Qwen2Config(mrope_section=MROPE_SECTION)
    vision: VisionConfig = VisionConfig()
    image_token_id: int = 151_655
    vision_start_token_id: int = 151_652
    video_token_id: int = 151_656
    eos_token_ids: tuple[int, ...] = field(default=())  # from the file; a tokenizer's are more reliable

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.language.hidden_size:
            raise InputError(
                f"config: the vision tower gives {self.vision.out_hidden_size} channels, the language model takes "
                f"{self.language.hidden_size}"
            )
        if not self.language.mrope_section:
            raise InputError("config: no mrope_section; Qwen2.5-VL has multimodal rotary positions")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Qwen25VLConfig:
        """From the content of a ``config.json``.

        It may have the language model's sizes at the top (Transformers up to 4.51) or in ``text_config`` (later 4.x
        and 5).

        Raises:
            InputError: another network.
        """
        text, vision = parts_of(config)
        known = {key: config[key] for key in _TOKENS if config.get(key) is not None}
        known["eos_token_ids"] = end_tokens_in(text)
        return cls(Qwen2Config.from_json(text), VisionConfig.from_json(vision), **known)


def parts_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The non-null settings of the language model and of the vision tower in a ``config.json``.

    Raises:
        InputError: another network.
    """
    if (kind := config.get("model_type")) != MODEL_TYPE:
        raise InputError(f"config: model_type {kind!r} is not supported, only {MODEL_TYPE!r}")
    vision, text = config.get("vision_config"), config.get("text_config")
    if not isinstance(vision, Mapping):
        raise InputError("config: no vision_config; is it the config.json of a Qwen2.5-VL?")
    if text is None:
        text = config
    elif not isinstance(text, Mapping):
        raise InputError(f"config: text_config is {text!r}; expected an object with keys")
    else:  # some versions write tie_word_embeddings at the top
        text = {"tie_word_embeddings": config.get("tie_word_embeddings", False)} | dict(text)
    vision = {"in_channels": vision.get("in_chans")} | dict(vision)  # the original's name
    text, vision = ({key: value for key, value in part.items() if value is not None} for part in (text, vision))
    return text, vision


def end_tokens_in(content: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text in a file of Transformers; empty if it has none.

    Raises:
        InputError: they are not tokens.
    """
    ends = content.get("eos_token_id")
    tokens = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise InputError(f"eos_token_id is {ends!r}; expected a whole number from 0, or a list of such")
    return tuple(tokens)


RewardToken = Literal["last", "mean", "special"]
