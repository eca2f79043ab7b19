"""The strength of a LoRA where no ``.alpha`` tensors give it: from the header, or a file beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.weights.files import TensorFiles

METADATA_KEY = "lora_adapter_metadata"  # diffusers >= 0.35
CONFIG_FILE = "adapter_config.json"  # PEFT
_COMPONENT = "transformer."


@dataclass(frozen=True)
class Strength:
    """alpha of each module.

    Attributes:
        default: of modules that no pattern matches; None stands for the rank.
        patterns: regular expression over a module's name (its end, as PEFT matches it) -> alpha.
        rslora: scale by alpha / sqrt(rank).
    """

    default: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def alpha(self, module: str) -> float | None:
        for pattern, alpha in self.patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.default


def strength_of(files: TensorFiles, *, has_alpha_keys: bool, default: float | None) -> Strength:
    """Reads the header's metadata (diffusers', kohya's) or PEFT's ``adapter_config.json`` beside the file.

    Args:
        has_alpha_keys: the file holds ``.alpha`` tensors, so kohya's single number is not asked.
        default: where nothing is said.
    """
    where = str(files.files[0])
    config = _peft_config(files)
    if config:
        return _from_peft(config, default, where)
    if not has_alpha_keys and (text := files.metadata.get("ss_network_alpha")) not in (None, "None", ""):
        return Strength(_number(text, "ss_network_alpha", where))
    return Strength(default)


def _peft_config(files: TensorFiles) -> dict[str, Any]:
    """PEFT's configuration of the transformer's adapter; empty: not given."""
    file = files.files[0]
    beside = file.with_name(CONFIG_FILE)
    try:
        if METADATA_KEY in files.metadata:
            everything = json.loads(files.metadata[METADATA_KEY])
            own = {k.removeprefix(_COMPONENT): v for k, v in everything.items() if k.startswith(_COMPONENT)}
            return own or {k: v for k, v in everything.items() if "." not in k}
        if file.stem == "adapter_model" and beside.is_file():
            return json.loads(beside.read_text())
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: the configuration of the LoRA does not parse ({error})") from error
    return {}


def _from_peft(config: Mapping[str, Any], default: float | None, where: str) -> Strength:
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise InputError(f"{where}: its configuration says {key}, which is not supported")
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    return Strength(
        default if alpha is None else _number(alpha, "lora_alpha", where),
        {pattern: _number(value, pattern, where) for pattern, value in patterns.items()},
        bool(config.get("use_rslora")),
    )


def _number(value: Any, name: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {name} is {value!r}, expected a number") from error
