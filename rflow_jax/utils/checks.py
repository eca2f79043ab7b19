"""What can be told to a model and written to a file."""

import math
import re
from collections.abc import Iterable
from difflib import SequenceMatcher

from rflow_jax.errors import InputError


def require_text(text: str, where: str) -> str:
    """The text; raises InputError, which begins with ``where``, if UTF-8 cannot hold it.

    JSON may hold half a surrogate pair, and so may a command line of other bytes; no tokenizer and no file takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half a surrogate pair, which is no text") from error
    return text


DTYPES = ("bfloat16", "float32")


LARGEST_SEED = 2**32 - 1


def require_dtype(name: str) -> str:
    """The name of a number type for weights and activations; raises InputError for one that cannot serve."""
    if name == "float16":
        raise InputError("dtype is float16: activations go beyond its largest number, 65504; take bfloat16")
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}: give {' or '.join(DTYPES)}")
    return name


def require_least(config: object, section: str, **least: int) -> None:
    """Raises InputError unless these fields of ``section`` are null, or finite and at least so much."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not bound <= value < math.inf:
            hint = f"at least {bound}" if value < bound else "a finite number"
            raise InputError(f"{_dotted(section, name)} is {value}: give {hint}")


def require_positive(config: object, section: str, *names: str) -> None:
    """Raises InputError unless these fields of ``section`` are null, or finite and above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{_dotted(section, name)} is {value}: give a finite number above 0")


def require_seed(name: str, seed: int) -> None:
    """Raises InputError unless JAX takes this seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"{name} is {seed}: give a number from 0 to {LARGEST_SEED}")


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def require_pattern(name: str, pattern: str | None) -> None:
    """Raises InputError unless this is a regular expression, or None."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise InputError(f"{name}: no regular expression ({error})") from error


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key most like ``key``; the last part of a dotted key may stand for the whole."""

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, key, candidate).ratio()
        last = SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    return max(known, key=likeness)
