"""Checks of settings and texts, and suggestions for misspelt names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from rflow_jax.errors import InputError


def require_text(text: str, source: str) -> str:
    """The text; raises InputError, which begins with ``source``, if it cannot be encoded as UTF-8.

    JSON and command lines may contain lone surrogates, which no tokenizer and no file accepts.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{source}: contains an unpaired surrogate (invalid UTF-8)") from error
    return text


# Keys and whole sections of a configuration that had another name in an earlier version: the old one -> the new one.
RENAMED = {
    "settings": "sampling",
    "share": "process_index and process_count",
    "noise.closeness": "noise.noise_similarity",
    "reflect.count_noise_images": "reflect.include_initial_images",
    "watch": "logging",
    "trainable": "lora",
    "trainable.pattern": "lora.target_modules",
    "trainable.lora": "lora.init_from",
    "trainable.parameters": "trainable_parameters",
    "train.accumulation": "train.gradient_accumulation_steps",
    "optimizer.clip": "optimizer.max_grad_norm",
    "data.shards": "data.path",
    "validation.shards": "validation.path",
    "data.buffer": "data.shuffle_buffer_size",
    "data.patience": "data.retry",
    "data.patience.longest_pause": "data.retry.max_backoff",
    "patience": "retry",
    "patience.longest_pause": "retry.max_backoff",
}


def current_key(key: str) -> str:
    """The name that a dotted key has in this version."""
    section, _, rest = key.rpartition(".")
    if key in RENAMED or not section:
        return RENAMED.get(key, key)
    return f"{current_key(section)}.{rest}"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


DTYPES = ("bfloat16", "float32")


def require_dtype(name: str) -> str:
    """The name of a dtype for weights and activations; raises InputError for an unusable one."""
    if name == "float16":
        raise InputError("dtype is float16: activations exceed its largest number, 65504; use bfloat16")
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}: give {' or '.join(DTYPES)}")
    return name


def require_pattern(name: str, pattern: str | None) -> None:
    """Raises InputError unless this is a regular expression, or None."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"{name}: not a regular expression ({error})") from error


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key most like ``key``; the last part of a dotted key may stand for the whole."""

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, key, candidate).ratio()
        last = SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    return max(known, key=likeness)


def suggestion(key: str, known: Sequence[str]) -> str:
    """``did you mean X?`` if a known key is similar, else the list of all."""
    best = nearest(key, known)
    similar = SequenceMatcher(None, key, best).ratio() >= 0.6
    return f"did you mean {best}?" if similar else f"known are {', '.join(known)}"
