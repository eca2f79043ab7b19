"""Tables of scenes: made once from a seed, packed into arrays, and drawn on the devices as they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rflow_jax.data.loader import require_same_records
from rflow_jax.data.workers import Workers, worker_count
from rflow_jax.shapes.edits import spoil
from rflow_jax.shapes.grammar import sample_prompt
from rflow_jax.shapes.render import EMPTY, draw, pack
from rflow_jax.shapes.scenes import Scene, make_scene
from rflow_jax.typing import Array, Float, Int, UInt8

CHUNK = 1024  # scenes that a worker makes at once
_THREADS = "OPENBLAS_NUM_THREADS"


class SceneTable(NamedTuple):
    """Scenes as :func:`~rflow_jax.shapes.render.pack` gives them.

    Attributes:
        items: [n, slots, 7], no more slots than the fullest scene needs.
        backgrounds: [n, 3].
    """

    items: Float[Array | np.ndarray, "n slots 7"]
    backgrounds: Float[Array | np.ndarray, "n 3"]

    def draw(self, indices: Int[Array, " b"]) -> UInt8[Array, "b 96 96 3"]:
        """Pictures of these scenes; inside of a program for devices."""
        # Products that a GPU rounds to TensorFloat-32 would move outlines by hundredths of a pixel.
        with jax.default_matmul_precision("highest"):
            pictures: Any = draw(self.items[indices], self.backgrounds[indices], jnp)
        return pictures

    @property
    def fingerprint(self) -> str:
        """A hash of all scenes."""
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).data for part in self)).hexdigest()[:16]


def sample_scene(seed: int, number: int, spoiled: float) -> Scene:
    """One scene of a training prompt, which depends on these numbers only.

    Args:
        spoiled: how often it is one that fails its prompt.
    """
    rng = Random(f"scene {number} of {seed}")
    prompt = sample_prompt(rng)
    scene = make_scene(prompt, rng)
    return spoil(scene, prompt, rng) if rng.random() < spoiled else scene


@dataclass(frozen=True)
class SceneMaker:
    """Makes the scenes of these numbers; runs in a worker. The arguments are those of :func:`sample_scene`."""

    seed: int
    spoiled: float

    def __call__(self, numbers: range) -> tuple[np.ndarray, np.ndarray]:
        return pack([sample_scene(self.seed, number, self.spoiled) for number in numbers])


def make_table(count: int, seed: int, *, spoiled: float, workers: int | None = None) -> SceneTable:
    """The first ``count`` scenes of a seed, the same with any number of workers.

    Args:
        spoiled: how many of them fail their prompts.
        workers: processes; None: all cores but one, and none for a small table. 0 uses this process.
    """
    made = made_in_chunks(SceneMaker(seed, spoiled), count, workers)
    items, backgrounds = (np.concatenate(parts) for parts in zip(*made, strict=True))
    used = int((items[..., 0] != EMPTY).any(0).sum())
    return SceneTable(np.ascontiguousarray(items[:, :used]), backgrounds)


def made_in_chunks(maker: Any, count: int, workers: int | None) -> list[Any]:
    """What a maker makes of the numbers below ``count``, chunk by chunk in their order.

    Args:
        maker: called with a range of numbers, in workers.
        workers: as in :func:`make_table`.
    """
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    processes = 0 if len(chunks) == 1 and workers is None else min(worker_count(workers), len(chunks))
    with _one_thread_each(), Workers(maker, processes) as makers:
        return [future.result() for future in [makers.submit(chunk) for chunk in chunks]]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keeps NumPy in processes that are started inside from starting a thread for every core of the machine."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


class NumberBatch(NamedTuple):
    """This process's samples of one step; attributes as in :class:`~rflow_jax.data.loader.HostBatch`.

    Attributes:
        numbers: uint32 [b].
    """

    step: int
    numbers: np.ndarray
    skipped: list[str]
    waited: float
    digest: str


class NumberLoader:
    """Endless batches of the numbers of samples, from which the devices draw all that makes a sample.

    Args:
        start: the first step.
        batch_size: samples of a step, of all processes.
        slots: the rows of a batch that this process makes.
        name: what a sample is called.
        fingerprint: of what the samples are made from.
        position: of a run that goes on.

    Raises:
        InputError: the samples of the position were made from something else.
    """

    def __init__(
        self,
        start: int,
        *,
        batch_size: int,
        slots: Sequence[int],
        name: str,
        fingerprint: str,
        position: Mapping[str, Any] | None,
    ):
        require_same_records(position, fingerprint)
        self._start, self._batch_size, self._slots = start, batch_size, np.asarray(slots)
        self._name, self._fingerprint = name, fingerprint

    def __iter__(self) -> Iterator[NumberBatch]:
        step = self._start
        while True:
            numbers = (step * self._batch_size + self._slots).astype(np.uint32)
            digest = hashlib.sha256(self._fingerprint.encode() + numbers.tobytes()).hexdigest()[:16]
            yield NumberBatch(step, numbers, [], 0.0, digest)
            step += 1

    def drawn(self, step: int) -> dict[str, int]:
        """Samples before a step, of all processes."""
        return {self._name: step * self._batch_size}

    def position(self, step: int) -> dict[str, Any]:
        """The state before a step, as JSON."""
        return {"number": step * self._batch_size, "fingerprint": self._fingerprint}

    def __enter__(self) -> NumberLoader:
        return self

    def __exit__(self, *_: object) -> None:
        pass
