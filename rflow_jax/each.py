"""Work on many items, batch by batch, where what is wrong with one is an error of that item alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rflow_jax.errors import InputError

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")
BATCHES_AT_ONCE = 4  # items are prepared for so many batches, so that like ones find each other


def do_each(
    items: Sequence[Item],
    prepare: Callable[[Item], Prepared],
    work: Callable[[Sequence[Prepared]], Iterable[Result]],
    *,
    batch_size: int,
) -> list[Result | InputError]:
    """One result an item, in order; for an item that cannot be prepared the reason.

    Args:
        prepare: what the work is given; may raise InputError.
        work: one result for each that could be prepared, in order; not called without any.
        batch_size: of the work; so much more than that is prepared at once, however many items there are.
    """
    results: list[Result | InputError] = []
    step = BATCHES_AT_ONCE * batch_size
    for start in range(0, len(items), step):
        results += _some(items[start : start + step], prepare, work)
    return results


def _some(
    items: Sequence[Item],
    prepare: Callable[[Item], Prepared],
    work: Callable[[Sequence[Prepared]], Iterable[Result]],
) -> list[Result | InputError]:
    prepared: dict[int, Prepared] = {}
    results: dict[int, Result | InputError] = {}
    for k, item in enumerate(items):
        try:
            prepared[k] = prepare(item)
        except InputError as error:
            results[k] = error
    done = work(list(prepared.values())) if prepared else ()
    results |= dict(zip(prepared, done, strict=True))
    return [results[k] for k in range(len(items))]


def require_fitting(tokens: int, context: int) -> None:
    """Raises InputError for a prompt, with its pictures, that is longer than the model can read."""
    if tokens > context:
        raise InputError(f"the prompt is too long: {tokens} tokens, the model reads {context}")
