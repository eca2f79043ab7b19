"""Many images before one verifier: as many at once, and as full batches, as it takes."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import PIL.Image

from rflow_jax.calls import Calls
from rflow_jax.errors import InputError
from rflow_jax.images import image_in
from rflow_jax.score.results import Found
from rflow_jax.score.targets import Target
from rflow_jax.verifiers.base import Verdict, Verifier, settled

Chunk = list[tuple[int, Target]]


def judge(verifier: Verifier, targets: Mapping[int, Target]) -> Iterator[tuple[int, Found]]:
    """Each image's verdict as it comes, with the key of its target; the verifier is closed in the end.

    Images are read by a thread more than the verifier takes calls, so that it need not wait for the disk.
    """
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    turn, ended = threading.Semaphore(verifier.concurrency), threading.Event()
    call = partial(_call, verifier, turn, ended)
    calls = Calls("score", call, verifier.concurrency + 1, 1, lambda _, found: heard.put(found), heard.put)
    works = list(targets.items())
    # Those in this process take several batches, to prepare the next while the device works; others just one.
    size = verifier.batch_size * getattr(verifier, "batches_a_call", 1)
    try:
        for start in range(0, len(works), size):
            calls.submit(works[start : start + size])
        left = len(works)
        while left:
            found = heard.get()
            if isinstance(found, BaseException):
                raise found
            yield from found
            left -= len(found)
    finally:
        ended.set()
        calls.close()
        verifier.close()
        calls.join()


def _call(
    verifier: Verifier, turn: threading.Semaphore, ended: threading.Event, chunks: Sequence[Chunk]
) -> list[list[tuple[int, Found]]]:
    return [_score(verifier, turn, ended, chunk) for chunk in chunks]


def _score(
    verifier: Verifier, turn: threading.Semaphore, ended: threading.Event, chunk: Chunk
) -> list[tuple[int, Found]]:
    found: dict[int, Found] = {}
    images: dict[int, PIL.Image.Image] = {}
    digests: dict[int, str] = {}
    for k, target in chunk:
        try:
            content = target.path.read_bytes()
            digests[k] = hashlib.sha256(content).hexdigest()
            images[k] = image_in(content)
        except InputError as error:
            found[k] = Found(target, digests[k], Verdict(None, error=str(error)))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            found[k] = Found(target, None, Verdict(None, error=f"cannot read the file ({reason})"))
    asked = {k: target for k, target in chunk if k in images}
    if asked:
        with turn:
            if ended.is_set():  # nobody waits for these
                return []
            verdicts = verifier.score(list(images.values()), [target.item for target in asked.values()])
        for (k, target), verdict in zip(asked.items(), verdicts, strict=True):
            found[k] = Found(target, digests[k], settled(verdict), verifier.name)
    return list(found.items())
