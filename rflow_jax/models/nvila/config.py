"""Sizes of NVILA and how its images are cut; what is not supported is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.models.nvila.message import NEWLINE
from rflow_jax.models.nvila.projector import tokens_of
from rflow_jax.models.nvila.tiling import Tiling
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.siglip import SiglipVisionConfig

KINDS = ("vila", "llava_llama", "llava_qwen")  # VILA has called itself by all of these
PROJECTOR = "mlp_downsample_3x3_fix"
_REQUIRED = {"image_aspect_ratio": "dynamic", "mm_vision_select_feature": "cls_patch", "s2": False, "dynamic_s2": False}


@dataclass(frozen=True)
class NvilaConfig:
    """Sizes of the whole.

    Attributes:
        mm_vision_select_layer: the tower's layer whose output the projector gets; -2 is the last but one.
        min_tiles, max_tiles: limits on the tiles of an image.
    """

    vision: SiglipVisionConfig
    language: Qwen2Config
    mm_vision_select_layer: int = -2
    min_tiles: int = 1
    max_tiles: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise InputError(f"NVILA config: between min_tiles {self.min_tiles} and max_tiles {self.max_tiles} is none")
        depth = self.vision.num_hidden_layers
        if not -depth - 1 <= self.mm_vision_select_layer <= depth:
            raise InputError(f"NVILA config: mm_vision_select_layer {self.mm_vision_select_layer} of {depth} layers")

    @classmethod
    def from_json(cls, config: Mapping[str, Any], vision: SiglipVisionConfig, language: Qwen2Config) -> NvilaConfig:
        """From the content of the checkpoint's own ``config.json`` and the sizes of two of its parts.

        Raises:
            InputError: another network, or a way of looking at images that is not supported.
        """
        require_nvila(config)
        for key, value in _REQUIRED.items():
            if (found := config.get(key, value)) not in (value, None):
                raise InputError(f"NVILA config: {key} {found!r} is not supported, only {value!r}")
        _require_plain_encoder(config.get("image_encoder"))
        known = ("mm_vision_select_layer", "min_tiles", "max_tiles")
        given = {key: config[key] for key in known if config.get(key) is not None}
        for key, value in given.items():
            if type(value) is not int:
                raise InputError(f"NVILA config: {key} is {value!r}; expected a whole number")
        return cls(vision, language, **given)

    @property
    def tiling(self) -> Tiling:
        """How images are cut."""
        return Tiling(self.vision.image_size, self.min_tiles, self.max_tiles)

    @property
    def picture_tokens(self) -> int:
        """Image tokens of a picture."""
        return tokens_of(self.vision.grid)


def require_nvila(config: Mapping[str, Any]) -> None:
    """Raises InputError unless a checkpoint's ``config.json`` is VILA's."""
    if (kind := config.get("model_type")) not in KINDS:
        raise InputError(f"NVILA config: model_type {kind!r} is not supported, only {', '.join(KINDS)}")


def require_projector(config: Mapping[str, Any]) -> None:
    """Raises InputError unless ``mm_projector/config.json`` names the projector that is here."""
    if (kind := config.get("mm_projector_type")) != PROJECTOR:
        raise InputError(f"mm_projector config: mm_projector_type {kind!r} is not supported, only {PROJECTOR!r}")


def _require_plain_encoder(encoder: Any) -> None:
    """A picture ends in one newline and begins with nothing; the checkpoint says otherwise in JSON inside of JSON."""
    try:
        told = json.loads(encoder) if isinstance(encoder, str) else encoder or {}
        plain = told.get("start_tokens") is None and told.get("end_tokens", NEWLINE) == NEWLINE
        plain = plain and str(told.get("_target_", "BasicImageEncoder")).endswith("BasicImageEncoder")
    except (ValueError, AttributeError):
        plain = False
    if not plain:
        raise InputError(f"NVILA config: image_encoder {encoder!r} is not supported, only VILA's BasicImageEncoder")
