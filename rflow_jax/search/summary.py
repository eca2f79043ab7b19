"""What a search has done, and what is missing, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rflow_jax.openai_client.usage import Usage
from rflow_jax.search.progress import SearchProgress
from rflow_jax.search.prompt_folder import BEST, SAMPLES

_NAMED = 5  # prompts


class Lacking(NamedTuple):
    """What finished prompts lack.

    Attributes:
        images: that could not be made.
        scores: of images without one.
        texts: reflections and refined prompts without one.
    """

    images: int
    scores: int
    texts: int

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Lacking:
        """Counted in the records of finished prompts."""
        records = list(records)
        images = [record for record in records if record.get("error") is None]
        verdicts = [record["verdict"] for record in images if isinstance(record.get("verdict"), Mapping)]
        scores = sum(verdict.get("score") is None for verdict in verdicts)
        texts = sum(len(record.get("text_errors") or ()) for record in images)
        return cls(len(records) - len(images), scores, texts)

    def __bool__(self) -> bool:
        return any(tuple(self))

    def in_words(self) -> str:
        """Such as ``2 of their images could not be made, 1 without a score``."""
        counts = zip(self, ("of their images could not be made", "without a score", "texts failed"), strict=True)
        return ", ".join(f"{count} {what}" for count, what in counts if count)


def summary(
    prompts: int, undecided: Sequence[int], live: SearchProgress, usage: Usage, out: Path, *, verified: bool
) -> str:
    """One line about a run.

    Args:
        prompts: that it searched.
        undecided: those of them that lack an answer.
        verified: whether images are scored.
    """
    counts = [f"{prompts} prompt{'s' if prompts > 1 else ''}", f"{live.images} images"]
    if verified:
        counts += [f"{live.scored} scored", f"{live.unscored} without a score"]
    if live.without_image:
        counts.append(f"{live.without_image} could not be made")
    if live.partly_scored:
        counts.append(f"{live.partly_scored} of them not by all members of the ensemble")
    if live.text_failures:
        counts.append(f"{live.text_failures} texts failed")
    if usage.converted:
        counts.append(f"{usage.converted} answers converted")
    if usage.prompt_tokens or usage.completion_tokens:
        least = "at least " if usage.unmetered else ""
        cost = "" if not usage.cost else f" ({least}${usage.cost:.2f})"
        counts.append(f"{usage.prompt_tokens + usage.completion_tokens:,} tokens{cost}")
    if undecided:
        named = ", ".join(f"{index:05d}" for index in undecided[:_NAMED]) + (", ..." if len(undecided) > _NAMED else "")
        counts.append(f"{len(undecided)} of the prompts not decided yet ({named}): the same command goes on with them")
    if len(undecided) == prompts:
        return ", ".join(counts)
    what, folder = ("the best", BEST) if live.scored else ("the images", SAMPLES)
    return f"{', '.join(counts)}; {what}{' of the others' if undecided else ''} are in {out}/*/{folder}"
