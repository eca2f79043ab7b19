"""Verifiers and writers in this process, made from what a search's configuration says of them.

``model`` names the checkpoint, and ``options`` holds fields of the class that configures such a model. Each is imported
only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from rflow_jax.errors import InputError
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.utils.plugins import parse_options
from rflow_jax.verifiers.base import Verifier
from rflow_jax.verifiers.config import VerifierConfig
from rflow_jax.writers.base import TextGenerator, TextGeneratorConfig

Config = TypeVar("Config")


def nvila(config: VerifierConfig, meter: UsageTracker | None = None) -> Verifier:
    """NVILA-Lite-2B-Verifier."""
    from rflow_jax.verifiers.nvila import NvilaVerifier, NvilaVerifierConfig

    return NvilaVerifier(configure(NvilaVerifierConfig, config.model, config.options, "verifier"))


def clip(config: VerifierConfig, meter: UsageTracker | None = None) -> Verifier:
    """CLIP's score."""
    from rflow_jax.verifiers.clip import CLIPVerifier, ClipVerifierConfig

    return CLIPVerifier(configure(ClipVerifierConfig, config.model, config.options, "verifier"))


def reward(config: VerifierConfig, meter: UsageTracker | None = None) -> Verifier:
    """The original's image verifier, Qwen2.5-VL with a reward head."""
    from rflow_jax.verifiers.reward import RewardVerifier, RewardVerifierConfig

    return RewardVerifier(configure(RewardVerifierConfig, config.model, config.options, "verifier"))


def qwen(config: TextGeneratorConfig, default_prompt: Path, meter: UsageTracker | None = None) -> TextGenerator:
    """Qwen2.5-VL as reflection generator or prompt refiner; both roles share a model that is configured alike."""
    from rflow_jax.vlm.qwen_chat import QwenChatConfig
    from rflow_jax.writers.qwen import QwenTextGenerator

    options = configure(QwenChatConfig, config.model, config.options, "writer")
    return QwenTextGenerator(_qwen_chat(options), default_prompt, config.prompt_file)


@lru_cache(maxsize=1)
def _qwen_chat(config: Any) -> Any:
    from rflow_jax.vlm.qwen_chat import QwenChat

    return QwenChat(config)


def claimed_devices(options: Mapping[str, Any]) -> Iterator[Sequence[int]]:
    """The devices that a role's model claims for itself, including those of an ensemble's members.

    Anything else under these names is left to the class that gets the options.
    """
    devices, members = options.get("devices"), options.get("members")
    if isinstance(devices, (list, tuple)) and devices and all(type(number) is int for number in devices):
        yield devices
    if isinstance(members, (list, tuple)) and all(isinstance(member, Mapping) for member in members):
        for member in members:
            if isinstance(own := member.get("options"), Mapping):
                yield from claimed_devices(own)


def configure(kind: type[Config], model: str | None, options: Mapping[str, Any], role: str) -> Config:
    """A model's own configuration.

    Args:
        kind: its dataclass, with a field ``model``.
        model: its checkpoint; None takes the default of ``kind``, if it has one.

    Raises:
        InputError: an unknown option, a value of another type, or no checkpoint.
    """
    required = any(field.name == "model" and field.default is MISSING for field in fields(kind))  # pyright: ignore[reportArgumentType]
    if model is None and required and "model" not in options:
        raise InputError(f"{role}.model: name the checkpoint, a folder or a Hub id")
    return parse_options(kind, dict(options) | ({} if model is None else {"model": model}), f"{role}.options")
