"""Scores many images with one verifier, with as many concurrent calls and as full batches as it takes."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import PIL.Image

from rflow_jax.errors import InputError, serving
from rflow_jax.openai_client.endpoint import Connection
from rflow_jax.scoring.results import ImageResult
from rflow_jax.scoring.targets import Target
from rflow_jax.search.run_folder import public_section
from rflow_jax.utils.images import image_in, picture_bytes
from rflow_jax.utils.registry import later_fields
from rflow_jax.utils.worker_pool import BatchingPool, wait_for
from rflow_jax.verifiers.base import Verdict, Verifier, normalize_verdict, score_images
from rflow_jax.verifiers.config import VERIFIERS, EnsembleVerifierConfig, RewardVerifierConfig, VerifierConfig

# Scores are known by the settings of their verifier. Those of an endpoint have the form of earlier versions, where all
# verifiers had all of these: no answer is paid for twice.
_OF_ENDPOINTS = {
    "temperature": None,
    "max_tokens": None,
    "structured": "auto",
    "prompts": None,
    "template": "question",
    "options": {},
}

Chunk = list[tuple[int, Target]]
Read = tuple[Target, str | None, PIL.Image.Image | str]  # (target, digest, image or why it could not be read)
PIXELS_AT_ONCE = 2**27  # of the images that a thread holds, beyond a batch: 400 MB in RGB


def judge(verifier: Verifier, targets: Mapping[int, Target]) -> Iterator[tuple[int, ImageResult]]:
    """Each image's verdict as it comes, with the key of its target; the verifier is closed in the end.

    One thread more than the verifier takes calls reads images, so that it never waits for the disk.
    """
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    turn, ended = threading.Semaphore(verifier.concurrency), threading.Event()

    def call(chunks: Sequence[Chunk]) -> list[list[tuple[int, ImageResult]]]:
        return [_score(verifier, turn, ended, chunk) for chunk in chunks]

    calls = BatchingPool("score", call, verifier.concurrency + 1, 1, lambda _, found: heard.put(found), heard.put)
    tasks = list(targets.items())
    # Verifiers in this process take several batches, to prepare the next while the device is busy; others just one.
    size = verifier.batch_size * getattr(verifier, "batches_a_call", 1)
    try:
        for start in range(0, len(tasks), size):
            calls.submit(tasks[start : start + size])
        left = len(tasks)
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
        wait_for(calls)


def _score(
    verifier: Verifier, turn: threading.Semaphore, ended: threading.Event, chunk: Chunk
) -> list[tuple[int, ImageResult]]:
    found: dict[int, ImageResult] = {}
    for part in _parts(chunk, verifier.batch_size):
        images = {k: image for k, (_, _, image) in part.items() if isinstance(image, PIL.Image.Image)}
        with turn:
            if ended.is_set():  # no one is waiting for these
                return []
            items = [part[k][0].item for k in images]
            with serving("verifier"):
                verdicts = score_images(verifier, list(images.values()), items) if images else []
        judged = dict(zip(images, map(normalize_verdict, verdicts), strict=True))
        for k, (target, sha256, reason) in part.items():
            found[k] = ImageResult(target, sha256, judged.get(k) or Verdict(None, error=str(reason)), verifier.name)
    return list(found.items())


def _parts(chunk: Chunk, batch_size: int) -> Iterator[dict[int, Read]]:
    """Splits a chunk into full batches that fit in memory together."""
    part: dict[int, Read] = {}
    count = pixels = 0
    for k, target in chunk:
        part[k] = _, _, image = _read(target)
        if isinstance(image, PIL.Image.Image):
            count, pixels = count + 1, pixels + image.width * image.height
            if pixels >= PIXELS_AT_ONCE and count % batch_size == 0:
                yield part
                part, count, pixels = {}, 0, 0
    if part:
        yield part


def _read(target: Target) -> Read:
    digest = None
    try:
        content = picture_bytes(target.path)
        digest = hashlib.sha256(content).hexdigest()
        return target, digest, image_in(content)
    except InputError as error:
        return target, digest, str(error)
    except (OSError, ValueError) as error:
        return target, None, f"cannot read the file ({getattr(error, 'strerror', None) or error})"


def scores_follow_from(config: VerifierConfig) -> dict[str, Any]:
    """The settings of a verifier and of an ensemble's members, with the checkpoints that they resolve to now.

    Raises:
        InputError: a reward model's checkpoint is not there.
    """
    later = later_fields(type(config))
    found = VERIFIERS.results_follow_from(public_section(config))
    found = {key: value for key, value in found.items() if key not in later or value != later[key]}
    if isinstance(config, Connection):
        return _OF_ENDPOINTS | found
    if isinstance(config, RewardVerifierConfig) and config.step is None:
        from rflow_jax.weights.hub import resolve_reward  # these import JAX, for which --help need not wait
        from rflow_jax.weights.reward_config import find_step

        found["step"], _ = find_step(resolve_reward(config.model))
    if isinstance(config, EnsembleVerifierConfig):
        found["members"] = [scores_follow_from(member) for member in config.members]
    return found
