"""The losses of the reward model, from the rewards of both pictures and which is preferred.

Source: ``ImageVLMRewardTrainer.compute_loss`` of ReflectionFlow's ``reward_modeling``. All are computed in float32; a
pair that a loss does not speak of counts as 0, and the mean is over all entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rflow_jax.data.jsonl.preferences import INVALID, TIE, A, B
from rflow_jax.typing import Array, Float, Int

LossName = Literal["bt", "margin", "constant_margin", "scaled", "reg", "btt"]
NEED_SCORES = ("scaled", "reg")  # without scores they are 0
# Without one of these labels the others are.
NEED_LABELS = {name: {A, B} for name in ("bt", "margin", "constant_margin", "scaled")} | {"btt": {A, B, TIE}}
MARGIN = 0.57
TIES = 5.0  # k of Bradley-Terry with ties: how much stronger a picture must be to be preferred
MIDDLE = 3.0  # of the people's scores


class Sides(NamedTuple):
    """Rewards of the chosen and of the rejected pictures; without a preference B stands as the chosen one."""

    chosen: Float[Array, " b"]
    rejected: Float[Array, " b"]
    margin: Float[Array, " b"]  # of the scores


def pair_losses(
    name: LossName, rewards: Float[Array, "b 2"], scores: Float[Array, "b 2"], labels: Int[Array, " b"]
) -> Float[Array, "b e"]:
    """The entries of a loss, whose mean is the loss: one a pair, and two with ``reg``.

    Args:
        rewards: of A and B.
        scores: what people gave A and B; 0: nothing.
        labels: 1 (A is preferred), -1 (B), 0 (neither), 22 (not known).
    """
    rewards, scores = rewards.astype(jnp.float32), scores.astype(jnp.float32)
    if name == "reg":
        return jnp.where(scores != 0, jnp.square(rewards - (scores - MIDDLE)), 0)
    losses, counted = _LOSSES[name](_sides(rewards, scores, labels), labels)
    return jnp.where(counted, losses, 0)[:, None]


def pair_accuracy(rewards: Float[Array, "b 2"], labels: Int[Array, " b"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(pairs with a preference whose preferred picture has the higher reward, pairs with a preference)."""
    preferred = _preferred(labels)
    right = jnp.where(labels == A, rewards[:, 0] > rewards[:, 1], rewards[:, 1] > rewards[:, 0])
    return jnp.sum(right & preferred, dtype=jnp.float32), jnp.sum(preferred, dtype=jnp.float32)


def _sides(rewards: Array, scores: Array, labels: Array) -> Sides:
    first = (labels == A)[:, None]
    (chosen, rejected), (high, low) = (jnp.where(first, x, x[:, ::-1]).T for x in (rewards, scores))
    return Sides(chosen, rejected, high - low)


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
