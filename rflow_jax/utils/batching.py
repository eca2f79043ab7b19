"""Work on many items, batch by batch, where what is wrong with one is an error of that item alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rflow_jax.errors import InputError
from rflow_jax.openai_client import CLOSED

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")
BATCHES_AT_ONCE = 4  # items are prepared for so many batches, so that like ones find each other
THREADS = min(8, os.cpu_count() or 1)  # pictures are decoded and resized without Python's lock


def map_batched(
    items: Sequence[Item],
    prepare: Callable[[Item], Prepared],
    work: Callable[[Sequence[Prepared]], Iterable[Result]],
    *,
    batch_size: int,
    closed: threading.Event | None = None,
) -> list[Result | InputError]:
    """One result an item, in order; for an item that cannot be prepared the reason.

    Items are prepared in threads, the next ones while the work is done on those before them.

    Args:
        prepare: what the work is given; may raise InputError.
        work: one result for each that could be prepared, in order; not called without any.
        batch_size: of the work; so many more than that are prepared at once, however many items there are.
        closed: once it is set nothing more is begun; the reason of the rest is ``CLOSED``.
    """
    step = BATCHES_AT_ONCE * batch_size
    results: list[Result | InputError] = []
    with ThreadPoolExecutor(THREADS, "prepare") as threads:

        def begin(start: int) -> list[Future[Prepared]]:
            return [threads.submit(prepare, item) for item in items[start : start + step]]

        following = begin(0)
        for start in range(step, len(items) + step, step):
            ready, failed = _settled(following)
            if closed is not None and closed.is_set():
                return results + [InputError(CLOSED)] * (len(items) - len(results))
            following = begin(start)
            results += _together(ready, failed, work)
    return results


def _settled(futures: Sequence[Future[Prepared]]) -> tuple[dict[int, Prepared], dict[int, InputError]]:
    ready: dict[int, Prepared] = {}
    failed: dict[int, InputError] = {}
    for k, future in enumerate(futures):
        try:
            ready[k] = future.result()
        except InputError as error:
            failed[k] = error
    return ready, failed


def _together(
    ready: dict[int, Prepared], failed: dict[int, InputError], work: Callable[[Sequence[Prepared]], Iterable[Result]]
) -> list[Result | InputError]:
    done = work(list(ready.values())) if ready else ()
    results: dict[int, Result | InputError] = {**failed, **dict(zip(ready, done, strict=True))}
    return [results[k] for k in sorted(results)]


def require_fitting(tokens: int, context: int) -> None:
    """Raises InputError for a prompt, with its pictures, that is longer than the model can read."""
    if tokens > context:
        raise InputError(f"the prompt is too long: {tokens} tokens, the model reads {context}")
