"""Processes many items in batches; an error of one item is the result of that item alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rflow_jax.errors import InputError

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")
CLOSED = "closed while the answer was awaited"
BATCHES_AT_ONCE = 4  # items are prepared for this many batches, so that similar ones can be batched together
THREADS = min(8, os.cpu_count() or 1)  # images are decoded and resized without the GIL


def map_batched(
    items: Sequence[Item],
    prepare: Callable[[Item], Prepared],
    work: Callable[[Sequence[Prepared]], Iterable[Result]],
    *,
    batch_size: int,
    closed: threading.Event | None = None,
) -> list[Result | InputError]:
    """One result per item, in order: an InputError for an item that cannot be prepared.

    Threads prepare the next items while ``work`` processes the previous ones.

    Args:
        prepare: makes the input of ``work`` from an item; may raise InputError.
        work: returns one result for each prepared item, in order; never called with none.
        batch_size: of ``work``; ``BATCHES_AT_ONCE`` times as many items are prepared at once.
        closed: once it is set nothing more is begun; the error of the rest is ``CLOSED``.
    """
    step = BATCHES_AT_ONCE * batch_size
    results: list[Result | InputError] = []
    with ThreadPoolExecutor(THREADS, "prepare") as threads:

        def begin(start: int) -> list[Future[Prepared]]:
            return [threads.submit(prepare, item) for item in items[start : start + step]]

        following = begin(0)
        for start in range(step, len(items) + step, step):
            ready: dict[int, Prepared] = {}
            done: dict[int, Result | InputError] = {}
            for k, future in enumerate(following):
                try:
                    ready[k] = future.result()
                except InputError as error:
                    done[k] = error
            if closed is not None and closed.is_set():
                return results + [InputError(CLOSED)] * (len(items) - len(results))
            following = begin(start)
            if ready:
                done.update(zip(ready, work(list(ready.values())), strict=True))
            results += [done[k] for k in sorted(done)]
    return results


def require_fitting(tokens: int, context: int) -> None:
    """Raises InputError for a prompt, with its images, that exceeds the model's context."""
    if tokens > context:
        raise InputError(f"the prompt is too long: {tokens} tokens, the model reads {context}")
