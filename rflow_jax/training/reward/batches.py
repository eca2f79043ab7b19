"""Pairs of pictures -> what the reward model is given."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, NamedTuple

import jax
import numpy as np

from rflow_jax.data.examples import decode
from rflow_jax.data.jsonl.preferences import INVALID, Pair
from rflow_jax.data.records import RecordError
from rflow_jax.errors import InputError
from rflow_jax.training.qwen.rows import Rows, RowSizes, rows_of
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


@dataclass(frozen=True)
class PairMaker:
    """A :class:`~rflow_jax.training.qwen.batches.Maker`.

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

    def digest(self, pair: Pair) -> bytes:
        """A hash of everything in a pair."""
        sums = [zlib.crc32(image) for image in (pair.image_a, pair.image_b)]
        return hashlib.sha256(f"{pair.prompt}\0{sums}\0{pair.label}".encode()).digest()

    def _sample(self, pair: Pair, content: bytes, name: str) -> Sample:
        image = decode(content, f"{pair.key}: {name}")
        try:
            sample = self.prepare.sample((image, self.template.safe_substitute(prompt=pair.prompt)))
        except InputError as error:
            raise RecordError(f"{pair.key}: {error}") from error
        if self.special is not None and np.sum(sample.ids == self.special) != 1:
            raise RecordError(f"{pair.key}: the prompt holds the special token")
        return self.sizes.require(sample, self.prepare.config, pair.key)
