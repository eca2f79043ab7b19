"""Ranges of settings, written where a setting is: ``workers: Workers | None``.

A range has an upper end too, far above any use, and below what a machine cannot do: start so many threads, keep so long
a list. NaN and infinity are in no range.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from rflow_jax.errors import InputError
from rflow_jax.utils.shown import one_line

_SHOWN = 40  # letters of a number in a message


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``.

    Attributes:
        above: ``low`` itself is left out.
        below: ``high`` itself is left out.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether a number is in it."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """In words, such as ``from 1 to 1,024``."""
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"{'above' if self.above else 'from'} {low} {'and below' if self.below else 'to'} {high}"


# What a run goes through one after the other: steps, records, pictures.
Count = Annotated[int, Range(1, 10**9)]
PairCount = Annotated[int, Range(2, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Position = Annotated[int, Range(-(10**12), 10**12)]  # in a list; a negative one counts from its end
# What is in memory together.
BatchSize = Annotated[int, Range(1, 2**16)]
Buffer = Annotated[int, Range(1, 10**7)]
SmallCount = Annotated[int, Range(1, 10_000)]  # rounds, branches, prompts in flight
# Threads and processes of this machine.
Concurrency = Annotated[int, Range(1, 1024)]
Workers = Annotated[int, Range(0, 1024)]
# Of many machines.
Devices = Annotated[int, Range(1, 2**20)]
Axis = Annotated[int, Range(-1, 2**20)]  # -1: the rest
DeviceId = Annotated[int, Range(0, 2**20)]
# Of a service.
Retries = Annotated[int, Range(0, 1000)]
Timeout = Annotated[float, Range(0.001, 86_400)]  # seconds
Seconds = Annotated[float, Range(0, 30 * 86_400)]
Price = Annotated[float, Range(0, 10**6)]
Temperature = Annotated[float, Range(0, 1000)]
# Of pictures and texts.
Side = Annotated[int, Range(1, 2**14)]  # pixels
Pixels = Annotated[int, Range(1, 2**28)]
Tokens = Annotated[int, Range(1, 2**20)]
DenoisingSteps = Annotated[int, Range(1, 10_000)]
Rank = Annotated[int, Range(1, 2**14)]
# Numbers.
Seed = Annotated[int, Range(0, 2**32 - 1)]  # that JAX takes
Share = Annotated[float, Range(0, 1)]
TopP = Annotated[float, Range(0, 1, above=True)]
Between = Annotated[float, Range(0, 1, above=True, below=True)]
Decay = Annotated[float, Range(0, 1, below=True)]
NotNegative = Annotated[float, Range(0, 10**9)]
Positive = Annotated[float, Range(0, 10**9, above=True)]
Ratio = Annotated[float, Range(1, 10**6)]
Finite = Annotated[float, Range(-(10**12), 10**12)]


def require_ranges(config: object, section: str = "") -> None:
    """Raises InputError for a field of a dataclass whose number, or one of whose numbers, is not in its range.

    Args:
        section: the dotted name of the dataclass in a configuration.
    """
    for name, (allowed, hint) in ranges_of(type(config)).items():
        value = getattr(config, name)
        for number in _numbers(value):
            if number not in allowed:
                kind = "whole number" if int in _leaves(hint) else "number"
                null = ", or null" if type(None) in get_args(hint) else ""
                shown = one_line(list(value) if isinstance(value, tuple) else value, _SHOWN)
                key = f"{section}.{name}" if section else name
                raise InputError(
                    f"{key} is {shown}: give {'a' if number is value else 'each a'} {kind} {allowed}{null}"
                )


@cache
def ranges_of(config: type) -> Mapping[str, tuple[Range, Any]]:
    """The fields of a dataclass that have a range -> (the range, their type)."""
    found = {}
    for name, hint in get_type_hints(config, include_extras=True).items():
        if ranges := [one for one in _leaves(hint) if isinstance(one, Range)]:
            found[name] = ranges[0], hint
    return found


def _leaves(hint: Any) -> Iterator[Any]:
    """The types and ranges that a type is made of."""
    metadata = getattr(hint, "__metadata__", ())
    yield from metadata
    inner = get_args(hint)[:1] if metadata else get_args(hint)
    for one in inner:
        yield from _leaves(one)
    if not inner:
        yield hint


def _numbers(value: Any) -> Iterator[float]:
    """The numbers of a value, which may be a list or sections of them."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
