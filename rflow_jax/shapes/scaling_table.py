"""What the scaling benchmark counts: pictures judged twice, the table of them, and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rflow_jax.report.charts import Chart, Series, Style, chart
from rflow_jax.shapes.arms import ARMS

COUNTS = (1, 2, 4, 8, 16, 32)
ORACLE, AGAIN = "noise, an oracle chooses", "keep or draw again, no corrector"
DRAWN = (ORACLE, "reflection", AGAIN, "noise", "prompt", "untrained")  # in the picture; all are in the table


class Judged(NamedTuple):
    """The pictures of one arm and seed.

    Attributes:
        scores: of the verifier, [prompts, images].
        right: what the exact judge says, [prompts, images].
        kept: whether the verifier found nothing wrong, [prompts, images].
    """

    scores: np.ndarray
    right: np.ndarray
    kept: np.ndarray

    def chosen(self, count: int) -> np.ndarray:
        """Whether the best by the verifier of the first ``count`` pictures is right, [prompts]."""
        return _at(self.right, self.scores[:, :count])

    def any_right(self, count: int) -> np.ndarray:
        """Whether any of the first ``count`` pictures is right, [prompts]."""
        return np.asarray(self.right[:, :count].any(axis=1))

    def again(self, count: int, chains: int) -> np.ndarray:
        """As :meth:`chosen`, where each chain draws again until the verifier finds nothing wrong, then keeps.

        A picture that is kept counts as an image of each later round, as one that a corrector is told to keep does.
        """
        rounds = max(count // chains, 1)
        drawn = self.kept[:, : rounds * chains].reshape(len(self.kept), rounds, chains)
        stops = np.where(drawn.any(axis=1), drawn.argmax(axis=1), rounds - 1)
        seen = np.arange(rounds)[None, :, None] <= stops[:, None, :]
        scores = np.where(seen.reshape(len(seen), -1)[:, :count], self.scores[:, :count], -np.inf)
        return _at(self.right, scores)


def _at(values: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """In each row the value where the score is highest; the first of equal ones."""
    return np.take_along_axis(values, scores.argmax(axis=1)[:, None], axis=1)[:, 0]


def table_of(judged: Mapping[str, Sequence[Judged]], tags: Sequence[str], images: int, chains: int) -> dict[str, Any]:
    """Means over seeds, with their standard deviation and the standard error over prompts.

    Returns:
        ``counts``; and ``arms``: title -> ``mean``, ``deviation`` (over seeds) and ``error`` (over prompts) at each
        count, and ``tags`` with the means of each tag.
    """
    counts = [count for count in COUNTS if count <= images]
    arms: dict[str, Any] = {}
    for name, runs in judged.items():
        arms[ARMS[name].title] = [[run.chosen(count) for count in counts] for run in runs]
        if name == "noise":
            arms[ORACLE] = [[run.any_right(count) for count in counts] for run in runs]
            arms[AGAIN] = [[run.again(count, chains) for count in counts] for run in runs]
    return {"counts": counts, "arms": {title: _summary(np.asarray(found), tags) for title, found in arms.items()}}


def _summary(right: np.ndarray, tags: Sequence[str]) -> dict[str, Any]:
    """Of decisions [seeds, counts, prompts]."""
    by_seed, by_prompt = right.mean(axis=2), right.mean(axis=0)
    several = len(right) > 1
    error = by_prompt.std(axis=1, ddof=1) / np.sqrt(right.shape[2]) if right.shape[2] > 1 else np.zeros(right.shape[1])
    named = np.asarray(tags)
    return {
        "mean": by_seed.mean(axis=0).tolist(),
        "deviation": (by_seed.std(axis=0, ddof=1) if several else np.zeros(right.shape[1])).tolist(),
        "error": error.tolist(),
        "tags": {tag: by_prompt[:, named == tag].mean(axis=1).tolist() for tag in dict.fromkeys(tags)},
    }


def markdown(table: Mapping[str, Any]) -> str:
    """Per cent of the prompts at each number of images, then of each tag's prompts at the largest.

    Each is the mean ± the standard deviation over seeds; the standard error over prompts stands below.
    """
    arms, counts = table["arms"], table["counts"]
    error = max(error for found in arms.values() for error in found["error"])
    rows = {
        title: [f"{100 * m:.1f} ± {100 * d:.1f}" for m, d in zip(found["mean"], found["deviation"], strict=True)]
        for title, found in arms.items()
    }
    tags = next(iter(arms.values()))["tags"]
    of_tags = {title: [f"{100 * found['tags'][tag][-1]:.1f}" for tag in tags] for title, found in arms.items()}
    return (
        _rows("images", counts, rows)
        + f"\nThe standard error over prompts is at most {100 * error:.1f}.\n\n"
        + _rows(f"with {counts[-1]} images", [tag.replace("_", " ") for tag in tags], of_tags)
    )


def _rows(corner: str, columns: Sequence[Any], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {' | '.join([corner, *map(str, columns)])} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join([title, *cells])} |" for title, cells in rows.items())]) + "\n"


def curves_of(table: Mapping[str, Any]) -> Chart:
    """The main arms' curves."""
    drawn = [ARMS[name].title if name in ARMS else name for name in DRAWN]
    means = {title: table["arms"][title]["mean"] for title in drawn if title in table["arms"]}
    means = means or {title: found["mean"] for title, found in table["arms"].items()}
    series = [Series(number, title, tuple(values)) for number, (title, values) in enumerate(means.items())]
    heights = [value for values in means.values() for value in values]
    return chart("Right pictures", table["counts"], series, heights, Style(900, 380, left=52, named=34), decides=True)
