"""How the best score grows with the number of images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rflow_jax.report.runs import Prompt, Run

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OVERALL = "overall"
UNTAGGED = "no tag"


@dataclass(frozen=True)
class Curve:
    """The mean over the prompts of a run that have a tag, or over all of them.

    Attributes:
        tag: whose prompts; :data:`OVERALL` for all.
        prompts, images, unscored: how many there are.
        values: for each number of images n, the mean over prompts of the best score among the first n images; for
            a verifier that decides, the share of prompts whose best of these is a "yes". A prompt counts from its
            first scored image on, and one with fewer images keeps its best. None where no prompt counts, or n is
            more than any prompt has.
    """

    tag: str
    prompts: int
    images: int
    unscored: int
    values: tuple[float | None, ...]


def numbers_of_images(runs: Iterable[Run]) -> list[int]:
    """1, 2, 4, ... as far as there are images, and the greatest number itself."""
    most = max(run.most for run in runs)
    return [*(2**k for k in range(most.bit_length()) if 2**k < most), most]


def tags(runs: Sequence[Run]) -> list[str]:
    """The tags of all prompts: GenEval's in its order, then others as they come; empty if no prompt has any."""
    found = dict.fromkeys(prompt.tag for run in runs for prompt in run.prompts)
    known = [tag for tag in GENEVAL_TAGS if tag in found]
    others = [tag for tag in found if tag is not None and tag not in GENEVAL_TAGS]
    return [*known, *others, *([UNTAGGED] if None in found and len(found) > 1 else [])]


def curve(run: Run, tag: str, numbers: Sequence[int]) -> Curve:
    """The curve of one tag, or of :data:`OVERALL`, at these numbers of images."""
    wanted = None if tag == UNTAGGED else tag
    prompts = [prompt for prompt in run.prompts if tag == OVERALL or prompt.tag == wanted]
    most = max((len(prompt.pictures) for prompt in prompts), default=0)
    return Curve(
        tag=tag,
        prompts=len(prompts),
        images=sum(len(prompt.pictures) for prompt in prompts),
        unscored=sum(not picture.scored for prompt in prompts for picture in prompt.pictures) if run.verified else 0,
        values=tuple(_mean(prompts, n, run.decides) if n <= most else None for n in numbers),
    )


def _mean(prompts: Sequence[Prompt], count: int, decides: bool) -> float | None:
    values = [value for prompt in prompts if (value := _best(prompt, count, decides)) is not None]
    return sum(values) / len(values) if values else None


def _best(prompt: Prompt, count: int, decides: bool) -> float | None:
    best = prompt.best(count)
    verdict = None if best is None else prompt.pictures[best].verdict
    if verdict is None:
        return None
    return float(verdict.label == "yes") if decides else verdict.score
