"""Ranks the images of a prompt by their verdicts: the only place where verdicts are compared.

A plain verdict has a rank of its own (:attr:`Verdict.rank`). Those of an ensemble are compared by rank aggregation
(Borda's count): each member ranks the images, and the weighted mean of an image's ranks decides.

A member's rank is taken as a share of the images that this member scored: those it ranks below, and half of those it
ranks alike, the image itself among them; equal images so have the mean of their ranks. An image that a member could not
score counts as its middle, 1/2: a failure neither helps nor harms, and the fewer members know an image the closer it
is to the middle. An image that no member scored is last. Therefore

- with one member the order is the member's own;
- an image that no member ranks below another, and one ranks above it, is before the other, if both were scored by
  the same members;
- a better score with one member never makes an image's position worse.

Which of two images is before the other may depend on the images that are compared with them, as always with ranks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from rflow_jax.verifiers.base import EnsembleVerdict, MemberVerdict, Verdict

MIDDLE = Fraction(1, 2)
Rank = tuple[int, float | Fraction]


def best_first(verdicts: Sequence[Verdict | None]) -> list[int]:
    """The positions of all verdicts, the best first; ties in their order, and what has no score last."""
    ranks: list[Rank] = [verdict.rank if verdict else (0, 0.0) for verdict in verdicts]
    if _aggregated(verdicts):
        shares = _weighted_shares(verdicts)
        ranks = [(1, shares[k]) if k in shares else (0, 0.0) for k in range(len(verdicts))]
    # Sorting is stable under reverse=True, so ties keep their order.
    return sorted(range(len(verdicts)), key=ranks.__getitem__, reverse=True)


def with_ensemble_scores(verdicts: Sequence[Verdict | None]) -> list[Verdict | None]:
    """The verdicts on all images of a prompt; those of an ensemble get a score: their weighted mean rank, 0 to 1."""
    shares = _weighted_shares(verdicts) if _aggregated(verdicts) else {}
    return [replace(v, score=float(shares[k])) if v and k in shares else v for k, v in enumerate(verdicts)]


def _aggregated(verdicts: Sequence[Verdict | None]) -> bool:
    return any(isinstance(verdict, EnsembleVerdict) for verdict in verdicts)


def _weighted_shares(verdicts: Sequence[Verdict | None]) -> dict[int, Fraction]:
    """The weighted mean of each image's shares, by its position; without those that no member scored.

    Exact: equal means stay equal, whatever the order of the images.
    """
    known = {k: v.members for k, v in enumerate(verdicts) if isinstance(v, EnsembleVerdict) and v.scored}
    totals = dict.fromkeys(known, Fraction(0))
    weights = Fraction(0)
    for column in zip(*known.values(), strict=True):
        weight = Fraction(str(column[0].weight))
        weights += weight
        for k, share in zip(known, _shares(column), strict=True):
            totals[k] += weight * share
    return {k: total / weights for k, total in totals.items()}


def _shares(column: Sequence[MemberVerdict]) -> list[Fraction]:
    """The share that one member gives each image."""
    ranks = sorted(member.verdict.rank for member in column if member.verdict.scored)

    def share(verdict: Verdict) -> Fraction:
        below, up_to = bisect_left(ranks, verdict.rank), bisect_right(ranks, verdict.rank)
        return Fraction(below + up_to, 2 * len(ranks))

    return [share(member.verdict) if member.verdict.scored else MIDDLE for member in column]
