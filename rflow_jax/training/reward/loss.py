"""Batches of preference pairs, and the losses on their rewards."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rflow_jax.data.records import RecordError
from rflow_jax.data.sources.preferences import INVALID, TIE, A, B, Pair
from rflow_jax.data.transforms import decode
from rflow_jax.errors import InputError
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.training.qwen.batches import Rows, RowSizes, inputs_of, rows_of
from rflow_jax.training.reward.config import LossName
from rflow_jax.training.train_state import MeanMetric, Metrics
from rflow_jax.typing import Array, Float, Int
from rflow_jax.vlm.qwen_batching import QwenSample
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, QwenProcessor
from rflow_jax.vlm.qwen_programs import Scoring, score


class PairExample(NamedTuple):
    """A prepared pair."""

    a: QwenSample
    b: QwenSample
    label: int
    scores: tuple[float, float]


class PairInputs(NamedTuple):
    """A batch of pairs as arrays.

    Attributes:
        rows: of both images of each pair: [b, 2, ...].
        labels, scores: as in :func:`pair_losses`.
    """

    rows: Rows | Any
    labels: Int[Array | np.ndarray, " b"]
    scores: Float[Array | np.ndarray, "b 2"]


@dataclass(frozen=True)
class PairMaker:
    """A :class:`~rflow_jax.training.qwen.batches.Collator`.

    Attributes:
        special: the token that a sample must contain once; None: there is none.
    """

    prepare: QwenProcessor
    template: Template
    sizes: RowSizes
    special: int | None

    def example(self, pair: Pair) -> PairExample:
        """Raises RecordError for a pair that cannot be used."""
        a, b = self._sample(pair, pair.image_a, "image_a"), self._sample(pair, pair.image_b, "image_b")
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

    def _sample(self, pair: Pair, content: bytes, name: str) -> QwenSample:
        image = decode(content, f"{pair.key}: {name}")
        try:
            sample = self.prepare.sample((image, self.template.safe_substitute(prompt=pair.prompt)))
        except InputError as error:
            raise RecordError(f"{pair.key}: {error}") from error
        if self.special is not None and np.sum(sample.ids == self.special) != 1:
            raise RecordError(f"{pair.key}: the prompt contains the special token")
        return self.sizes.require(sample, self.prepare.config, pair.key)


NEED_SCORES = ("scaled", "reg")  # without scores they are 0
# The labels of which at least one must occur.
NEED_LABELS = {name: {A, B} for name in ("bt", "margin", "constant_margin", "scaled")} | {"btt": {A, B, TIE}}
MARGIN = 0.57
TIES = 5.0  # k of Bradley-Terry with ties: how much stronger an image must be to be preferred
MIDDLE = 3.0  # of the people's scores


class Sides(NamedTuple):
    """Rewards of the chosen and of the rejected images; without a preference B counts as the chosen one."""

    chosen: Float[Array, " b"]
    rejected: Float[Array, " b"]
    margin: Float[Array, " b"]  # of the scores


def pair_losses(
    name: LossName, rewards: Float[Array, "b 2"], scores: Float[Array, "b 2"], labels: Int[Array, " b"]
) -> Float[Array, "b e"]:
    """The entries of a loss, whose mean is the loss: one per pair, and two with ``reg``.

    Args:
        rewards: of A and B.
        scores: people's scores of A and B; 0: none.
        labels: 1 (A is preferred), -1 (B), 0 (neither), 22 (not known).
    """
    rewards, scores = rewards.astype(jnp.float32), scores.astype(jnp.float32)
    if name == "reg":
        return jnp.where(scores != 0, jnp.square(rewards - (scores - MIDDLE)), 0)
    first = (labels == A)[:, None]
    (chosen, rejected), (high, low) = (jnp.where(first, x, x[:, ::-1]).T for x in (rewards, scores))
    losses, counted = _LOSSES[name](Sides(chosen, rejected, high - low), labels)
    return jnp.where(counted, losses, 0)[:, None]


def pair_accuracy(rewards: Float[Array, "b 2"], labels: Int[Array, " b"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(number of pairs whose preferred image has the higher reward, number of pairs with a preference)."""
    preferred = _preferred(labels)
    right = jnp.where(labels == A, rewards[:, 0] > rewards[:, 1], rewards[:, 1] > rewards[:, 0])
    return jnp.sum(right & preferred, dtype=jnp.float32), jnp.sum(preferred, dtype=jnp.float32)


def _preferred(labels: Array) -> Array:
    return (labels == A) | (labels == B)


def _bradley_terry(shift: Callable[[Sides], Array | float]) -> Callable[[Sides, Array], tuple[Array, Array]]:
    def losses(sides: Sides, labels: Array) -> tuple[Array, Array]:
        return -jax.nn.log_sigmoid(sides.chosen - sides.rejected - shift(sides)), _preferred(labels)

    return losses


def _scaled(sides: Sides, labels: Array) -> tuple[Array, Array]:
    return -sides.margin * jax.nn.log_sigmoid(sides.chosen - sides.rejected), _preferred(labels)


def _with_ties(sides: Sides, labels: Array) -> tuple[Array, Array]:
    """Rao and Kupper (1967)."""
    log_k = math.log(TIES)
    chosen = -jax.nn.log_sigmoid(sides.chosen - sides.rejected - log_k)
    rejected = -jax.nn.log_sigmoid(sides.rejected - sides.chosen - log_k)
    tie = chosen + rejected - math.log(TIES**2 - 1)
    return jnp.where(labels == TIE, tie, chosen), labels != INVALID


_LOSSES = {
    "bt": _bradley_terry(lambda sides: 0.0),
    "margin": _bradley_terry(lambda sides: sides.margin),
    "constant_margin": _bradley_terry(lambda sides: MARGIN),
    "scaled": _scaled,
    "btt": _with_ties,
}


@dataclass(frozen=True)
class PairObjective:
    """(trainable, frozen, pairs) -> (loss, pair accuracy); an :data:`~rflow_jax.training.train_state.Objective`.

    Attributes:
        graph: of the reward model.
        unit: patches per token.
    """

    graph: nnx.GraphDef
    rules: ImageProcessorConfig
    scoring: Scoring
    loss: LossName
    unit: int
    attention: AttentionImpl = "auto"
    remat: Remat = "none"

    def __call__(self, trainable: nnx.State, frozen: nnx.State, pairs: PairInputs) -> tuple[Float[Array, ""], Metrics]:
        rewards = self.rewards(trainable, frozen, pairs)
        loss = jnp.mean(pair_losses(self.loss, rewards, jnp.asarray(pairs.scores), jnp.asarray(pairs.labels)))
        return loss, {"accuracy": MeanMetric(*pair_accuracy(rewards, jnp.asarray(pairs.labels)))}

    def rewards(self, trainable: nnx.State, frozen: nnx.State, pairs: PairInputs) -> Float[Array, "b 2"]:
        """Rewards of both images of each pair."""
        model = nnx.merge(self.graph, trainable, frozen)
        # All images are rows of one batch.
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs.rows)
        inputs = inputs_of(rows, self.unit)
        found = score(model, self.rules, self.scoring, inputs, attention=self.attention, remat=self.remat)
        return found[:, 0].reshape(-1, 2)
