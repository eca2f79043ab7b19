"""Pairs -> batches: decoded, tokenized and cut into patches by workers, then stacked."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, NamedTuple

import jax
import numpy as np

from rflow_jax.data.examples import decode
from rflow_jax.data.loader import Loader, Made
from rflow_jax.data.preferences import INVALID, Pair, PairSource
from rflow_jax.data.records import RecordError
from rflow_jax.data.shuffle import Job, ShuffledPlan
from rflow_jax.errors import InputError
from rflow_jax.training.qwen.rows import Rows, RowSizes, rows_of
from rflow_jax.training.reward.config import PairDataConfig
from rflow_jax.typing import Array, Float, Int
from rflow_jax.vlm.qwen_inputs import Sample
from rflow_jax.vlm.qwen_prepare import Preparation


class PairExample(NamedTuple):
    """A prepared pair."""

    a: Sample
    b: Sample
    label: int
    scores: tuple[float, float]


class PairInputs(NamedTuple):
    """A batch of pairs as arrays.

    Attributes:
        rows: of both pictures of each pair: [b, 2, ...].
        labels, scores: as in :func:`~rflow_jax.training.reward.losses.pair_losses`.
    """

    rows: Rows | Any
    labels: Int[Array | np.ndarray, " b"]
    scores: Float[Array | np.ndarray, "b 2"]


class PairBatch(NamedTuple):
    """This process's pairs of one step; attributes as in :class:`~rflow_jax.data.loader.HostBatch`."""

    step: int
    inputs: PairInputs
    skipped: list[str]
    waited: float
    digest: str


@dataclass(frozen=True)
class PairMaker:
    """Makes what the network is given of a pair.

    Attributes:
        special: the token of which a sample must hold one; None: there is none.
    """

    prepare: Preparation
    template: Template
    sizes: RowSizes
    special: int | None

    def example(self, pair: Pair) -> PairExample:
        """Raises RecordError for a pair that cannot be used."""
        a, b = (
            self._sample(pair, content, name)
            for name, content in (("image_a", pair.image_a), ("image_b", pair.image_b))
        )
        return PairExample(a, b, pair.label, (pair.score_a, pair.score_b))

    def inputs(self, examples: Sequence[PairExample], count: int) -> PairInputs:
        """Examples as arrays, filled up to ``count`` with copies of the first that have no influence."""
        padded = [*examples, *[examples[0]._replace(label=INVALID, scores=(0.0, 0.0))] * (count - len(examples))]
        samples = [sample for example in padded for sample in (example.a, example.b)]
        rows = rows_of(samples, self.prepare.config, pad=self.prepare.tokenizer.pad, sizes=self.sizes)
        return PairInputs(
            jax.tree.map(lambda x: x.reshape(count, 2, *x.shape[1:]), rows),
            np.asarray([example.label for example in padded], np.int32),
            np.asarray([example.scores for example in padded], np.float32),
        )

    def _sample(self, pair: Pair, content: bytes, name: str) -> Sample:
        image = decode(content, f"{pair.key}: {name}")
        try:
            sample = self.prepare.sample((image, self.template.safe_substitute(prompt=pair.prompt)))
        except InputError as error:
            raise RecordError(f"{pair.key}: {error}") from error
        if self.special is not None and np.sum(sample.ids == self.special) != 1:
            raise RecordError(f"{pair.key}: the prompt holds the special token")
        return self.sizes.require(sample, self.prepare.config, pair.key)


@dataclass(frozen=True)
class MakePair:
    """Reads the pair that a job names, and prepares it; runs in a worker."""

    source: PairSource
    maker: PairMaker

    def __call__(self, job: Job) -> Made:
        try:
            pair = self.source.read(job.index)
            return Made(self.maker.example(pair), _digest(pair))
        except RecordError as error:
            return Made(None, b"", str(error))


class PairLoader(Loader):
    """Batches of pairs."""

    def __init__(self, plan: ShuffledPlan, source: PairSource, maker: PairMaker, config: PairDataConfig, start: int):
        super().__init__(plan, MakePair(source, maker), config, start)
        self._maker = maker

    def _batch(self, step: int, numbers: np.ndarray, made: Sequence[Made], skipped: list[str], waited: float) -> Any:
        inputs = self._maker.inputs([one.example for one in made], len(made))
        digest = hashlib.sha256(b"".join(one.digest for one in made)).hexdigest()[:16]
        return PairBatch(step, inputs, skipped, waited, digest)


def open_pair_loader(
    source: PairSource,
    maker: PairMaker,
    config: PairDataConfig,
    *,
    start: int,
    position: Mapping[str, Any] | None,
    **how: Any,
) -> PairLoader:
    """Batches from a step on; ``how`` as in :class:`~rflow_jax.data.shuffle.ShuffledPlan`."""
    plan = ShuffledPlan(len(source), fingerprint=source.fingerprint, name="pairs", position=position, **how)
    return PairLoader(plan, source, maker, config, start)


def _digest(pair: Pair) -> bytes:
    sums = [zlib.crc32(image) for image in (pair.image_a, pair.image_b)]
    return hashlib.sha256(f"{pair.prompt}\0{sums}\0{pair.label}".encode()).digest()
