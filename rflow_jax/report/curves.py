"""Names of runs, numbers in words, and the curves of scores."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from rflow_jax.report.runs import Prompt, SearchRun


def names(runs: Sequence[SearchRun]) -> list[str]:
    """The last parts of each run's path, as many as no other run's path ends with."""
    paths = [run.folder.absolute().parts for run in runs]
    found = []
    for path in paths:
        others = [other for other in paths if other != path]
        unique = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others))
        found.append("/".join(path[-next(unique, len(path)) :]))
    return found


def count(number: int, what: str) -> str:
    """``1 prompt``, ``17,696 images``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def value(number: float | None, decides: bool) -> str:
    """A mean score, or a share in per cent."""
    if number is None:
        return "–"
    return f"{100 * number:.3g} %" if decides else f"{number:.2f}"


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``3 h 05 min``."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def verifier(run: SearchRun) -> str:
    """The model that scored the images."""
    if not run.verified:
        return "none"
    section = run.config.get("verifier")
    section = section if isinstance(section, dict) else {}
    return _text(section.get("model")) or _text(section.get("name")) or "unknown"


def model(run: SearchRun) -> str:
    """The generator, and its corrector if it has one."""
    parts = [_text(run.config.get("model")) or "unknown", _text(run.config.get("lora"))]
    return " + ".join(part.rstrip("/").rpartition("/")[2] for part in parts if part)


def strategy(run: SearchRun) -> str:
    """The kind of search."""
    return _text(run.config.get("strategy")).replace("_", " + ") or "unknown"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


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


def numbers_of_images(runs: Iterable[SearchRun]) -> list[int]:
    """1, 2, 4, ... as far as there are images, and the greatest number itself."""
    most = max(run.most for run in runs)
    return [*(2**k for k in range(most.bit_length()) if 2**k < most), most]


def tags(runs: Sequence[SearchRun]) -> list[str]:
    """The tags of all prompts: GenEval's in its order, then others as they come; empty if no prompt has any."""
    found = dict.fromkeys(prompt.tag for run in runs for prompt in run.prompts)
    known = [tag for tag in GENEVAL_TAGS if tag in found]
    others = [tag for tag in found if tag is not None and tag not in GENEVAL_TAGS]
    return [*known, *others, *([UNTAGGED] if None in found and len(found) > 1 else [])]


def curve(run: SearchRun, tag: str, numbers: Sequence[int]) -> Curve:
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
    best = [prompt.pictures[k].verdict for prompt in prompts if (k := prompt.best(count)) is not None]
    scores = [float(verdict.label == "yes") if decides else verdict.score for verdict in best if verdict]
    values = [score for score in scores if score is not None]
    return sum(values) / len(values) if values else None


def summary_table(runs: Sequence[SearchRun]) -> Table:
    """The mean best score after 1, 2, 4, ... images for each tag and overall, a line a run.

    For a verifier that decides it is the share of prompts whose best image is a "yes".
    """
    numbers = numbers_of_images(runs)
    several = len(runs) > 1
    table = Table(title="Mean best score by number of images", title_justify="left", box=SIMPLE, collapse_padding=True)
    if any(run.decides for run in runs):
        table.title = "Prompts whose best image is a yes, by number of images"
    if any(run.decides for run in runs) and not all(run.decides for run in runs):
        table.title = "Mean best score, or prompts whose best image is a yes (%), by number of images"
    table.add_column("tag", no_wrap=True)
    if several:
        table.add_column("run", overflow="fold")
    for column in ("prompts", "images", *map(str, numbers), "unscored"):
        table.add_column(column, justify="right", no_wrap=True)
    for tag in [*tags(runs), OVERALL]:
        for name, run in zip(names(runs), runs, strict=True):
            found = curve(run, tag, numbers)
            # Text, not markup: a tag or a folder's name may hold brackets.
            row = [tag.replace("_", " "), *([name] if several else []), str(found.prompts), str(found.images)]
            row += [value(mean, run.decides) for mean in found.values]
            row += [str(found.unscored) if run.verified else "–"]
            table.add_row(*map(Text, row), style="bold" if tag == OVERALL else None)
        if several:
            table.add_section()
    return table
