"""The alpha of a LoRA's modules, as the file's header or PEFT's configuration beside it gives it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.utils.json_files import parse_json, read_object
from rflow_jax.weights.safetensors_io import TensorFiles

METADATA_KEY = "lora_adapter_metadata"  # diffusers >= 0.35
CONFIG_FILE = "adapter_config.json"  # PEFT
COMPONENT = "transformer."
# A name, perhaps with the sign of a beginning and escaped dots: takes no time to match.
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\\.)+\$?")
_PATTERNS = 10_000
_SECONDS = 5.0  # for all patterns on all modules: a real file's take milliseconds
_MATCHER = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
json.dump([[name for name in names if pattern.match(name)] for pattern in compiled], sys.stdout)
"""


@dataclass(frozen=True)
class LoraAlpha:
    """alpha of each module.

    Attributes:
        default: of modules that no pattern matches; None means the rank.
        by_module: of modules that one matches.
        rslora: scale by alpha / sqrt(rank).
    """

    default: float | None = None
    by_module: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def alpha(self, module: str) -> float | None:
        return self.by_module.get(module, self.default)


def read_alpha(files: TensorFiles, modules: Iterable[str], *, has_alpha_keys: bool, default: float | None) -> LoraAlpha:
    """Reads the header's metadata (diffusers', kohya's) or PEFT's ``adapter_config.json`` beside the file.

    Args:
        modules: their names in the file.
        has_alpha_keys: the file has ``.alpha`` tensors, so kohya's single number is ignored.
        default: if the file does not give it.

    Raises:
        InputError: what is given is no number, or of an adapter that is not a plain LoRA.
    """
    source, config = str(files.files[0]), _peft_config(files)
    if not config:
        if not has_alpha_keys and (text := files.metadata.get("ss_network_alpha")) not in (None, "None", ""):
            return LoraAlpha(_number(text, "ss_network_alpha in its metadata", source))
        return LoraAlpha(default)
    if (kind := str(config.get("peft_type") or "LORA")[:40]).upper() != "LORA":
        raise InputError(f"{source}: its configuration says peft_type {kind}; only LoRA is supported")
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise InputError(f"{source}: its configuration says {key}, which is not supported")
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{source}: alpha_pattern is {str(patterns)[:40]!r}; expected an object")
    if len(patterns) > _PATTERNS:
        raise InputError(f"{source}: alpha_pattern has {len(patterns)} patterns; a FLUX transformer has fewer linears")
    numbers = {pattern: _number(value, pattern[:100], source) for pattern, value in patterns.items()}
    matched = match_patterns(list(numbers), list(modules), source)
    # PEFT takes the first pattern that matches.
    by_module = {module: numbers[pattern] for pattern in reversed(numbers) for module in matched[pattern]}
    return LoraAlpha(
        default if alpha is None else _number(alpha, "lora_alpha", source), by_module, bool(config.get("use_rslora"))
    )


def match_patterns(patterns: Sequence[str], modules: Sequence[str], source: str) -> dict[str, list[str]]:
    """Pattern -> the modules that it matches, at their end as PEFT does; raises InputError for one that is not usable.

    Nothing stops Python's ``re`` once it is at work, and a file may hold a pattern that keeps it at work for years:
    those that are more than a name are matched in a process of its own.
    """
    plain = {pattern: re.compile(_at_end(pattern)) for pattern in patterns if _PLAIN.fullmatch(pattern)}
    found = {pattern: [module for module in modules if ready.match(module)] for pattern, ready in plain.items()}
    if rest := [pattern for pattern in patterns if pattern not in found]:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _MATCHER],
                input=json.dumps([[_at_end(pattern) for pattern in rest], modules]),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=True,
            )
        except subprocess.SubprocessError as error:
            what = "take too long" if isinstance(error, subprocess.TimeoutExpired) else "cannot be used"
            raise InputError(f"{source}: patterns of alpha_pattern {what}, such as {rest[0][:100]!r}") from error
        found |= zip(rest, json.loads(done.stdout), strict=True)
    return found


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _peft_config(files: TensorFiles) -> dict[str, Any]:
    """PEFT's configuration of the transformer's adapter; empty if not given."""
    file = files.files[0]
    beside = file.with_name(CONFIG_FILE)
    if METADATA_KEY in files.metadata:
        try:
            everything = parse_json(files.metadata[METADATA_KEY], f"{file}: {METADATA_KEY} in its metadata")
            own = {k.removeprefix(COMPONENT): v for k, v in everything.items() if k.startswith(COMPONENT)}
        except AttributeError as error:
            raise InputError(f"{file}: the configuration of the LoRA is not an object") from error
        return own or {k: v for k, v in everything.items() if "." not in k}
    return read_object(beside) if file.stem == "adapter_model" and beside.is_file() else {}


def _number(value: Any, name: str, source: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{source}: {name} is {str(value)[:40]!r}, expected a finite number")
    return number
