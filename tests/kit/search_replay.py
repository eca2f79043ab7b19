"""Replays of the original's recorded searches by ours.

``tests/golden_search`` holds what the original's own scripts decided on scripted scores; its README says how each
trace was recorded and what ``shows`` means. A replay gives our search the same scores. Images go by the original's
names: ours numbers the branches of a round by chain, the original by score, so a child is known by its parent.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pytest

from rflow_jax.language.base import Case
from rflow_jax.search.chains import Sample, best_first, chains, last_round, next_parents
from rflow_jax.search.engine import _case, _Prompt
from rflow_jax.search.store import PromptFolder
from rflow_jax.verifiers.base import Verdict

Trace = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "golden_search"


# The adapter: what lies below knows our search through these functions only.


class Draft(NamedTuple):
    round: int
    branch: int
    parent: int | None


def plan(trace: Trace, samples: Sequence[Sample]) -> list[Draft]:
    """The images of the next round; none when the search is at its end."""
    settings = trace["settings"]
    number = max((sample.round for sample in samples), default=-1) + 1
    if number == settings.get("noise_rounds", 0) + settings["rounds"]:
        return []
    parents: Sequence[int | None] = [None] * settings["branches"]
    if trace["script"] == "tts_t2i_noise_prompt_scaling.py" and samples:
        parents = last_round(samples)
    if trace["script"] == "tts_reflectionflow.py":
        parents = next_parents(samples, settings["branches"])
    return [Draft(number, branch, parent) for branch, parent in enumerate(parents)]


def counted_chains(samples: Sequence[Sample], count_noise_images: bool) -> list[list[int]]:
    """Our chains; with the original's accounting, without the noise images that they began with."""
    return [chain[0 if count_noise_images else 1 :] for chain in chains(samples)]


def best_of(samples: Sequence[Sample], among: Sequence[int]) -> int:
    return best_first(samples, among)[0]


def case_of(sample: Sample, prompt: str, folder: Path) -> Case:
    """What the models that write are told about an image."""
    entry = {"prompt": prompt}
    PIL.Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    return _case(_Prompt(0, entry, PromptFolder(folder, 0, entry)), sample)


# The replay.


@dataclass
class Replay:
    """Our search in the original's names of the images; the lists are by round of correction."""

    parents: list[set[str]] = field(default_factory=list)
    parent_of: dict[str, str] = field(default_factory=dict)
    told: dict[str, Case] = field(default_factory=dict)
    chains: list[list[list[str]]] = field(default_factory=list)
    best_of_chains: list[list[str]] = field(default_factory=list)
    last_round: list[str] = field(default_factory=list)
    best: str = ""
    scored: Counter[str] = field(default_factory=Counter)


def verdict(entry: Sequence[Any] | None) -> Verdict:
    """A scripted score as our verifiers say it; None is a failure."""
    if entry is None:
        return Verdict(None, error="scripted failure")
    first, second = entry
    return Verdict(float(second), first) if first in ("yes", "no") else Verdict(float(first), explanation=second)


def child_name(children: Sequence[dict[str, str]], parent: str, taken: Counter[str]) -> str:
    """The original's child of this parent, or else one of that round that nothing stands for yet."""
    free = [child for child in children if child["image"] not in taken]
    return next((child for child in free if child["parent"] == parent), free[0])["image"]


def replay(trace: Trace, folder: Path, count_noise_images: bool = False, unscored: str | None = None) -> Replay:
    """Our search with the trace's settings and scores; scoring ``unscored`` fails."""
    result, samples, names = Replay(), list[Sample](), list[str]()

    def make(draft: Draft, name: str, texts: dict[str, str]) -> None:
        result.scored[name] += 1
        seed = (0, trace["prompt_index"], draft.round, draft.branch)
        found = verdict(None if name == unscored else trace["scores"][name])
        refined, reflection = texts.get("refined_prompt"), texts.get("reflection")
        samples.append(Sample(*draft[:2], seed, "../pixel.png", draft.parent, reflection, refined, verdict=found))
        names.append(name)

    def named(positions: Sequence[int]) -> list[str]:
        return [names[position] for position in positions]

    for name in trace["start_order"]:
        number, branch = name[1:].split(".")
        make(Draft(int(number) - 1, int(branch), None), name, {})
    for made in trace["rounds"]:
        for draft in plan(trace, samples):
            assert draft.parent is not None
            parent = names[draft.parent]
            name = child_name(made["children"], parent, result.scored)
            result.parent_of[name] = parent
            result.told[name] = case_of(samples[draft.parent], trace["prompt"], folder)
            make(draft, name, next(child for child in made["children"] if child["image"] == name))
        newest = last_round(samples)
        result.parents.append({result.parent_of[name] for name in named(newest)})
        lines = counted_chains(samples, count_noise_images)
        result.chains.append([named(line) for line in lines])
        result.best_of_chains.append([names[best_of(samples, line)] for line in lines])
    assert plan(trace, samples) == []
    counted = [p for p, sample in enumerate(samples) if count_noise_images or sample.parent is not None]
    result.last_round, result.best = named(last_round(samples)), names[best_of(samples, counted)]
    return result


def load(file: str) -> list[Trace]:
    return json.loads((FOLDER / f"{file}.json").read_text())


REFLECTION = {
    f"{file[11:]}-{trace['name']}": trace for file in ("reflection_gpt", "reflection_nvila") for trace in load(file)
}


def where(keep: Callable[[Trace], bool]) -> pytest.MarkDecorator:
    chosen = {name: trace for name, trace in REFLECTION.items() if keep(trace)}
    return pytest.mark.parametrize("trace", chosen.values(), ids=chosen.keys())


def showing(defect: str) -> pytest.MarkDecorator:
    return where(lambda trace: defect in trace["shows"])


SPOILS_DECISIONS = {
    "same_image_twice",
    "siblings_in_one_chain",
    "score_of_another_image",
    "child_in_no_chain",
    "run_died",
    "too_few_start_images",  # not a defect: it has its own test
}
SPOILS_TEXTS = SPOILS_DECISIONS | {"texts_of_another_image"}


def by_first(chains: Sequence[Sequence[str]], best: Sequence[str]) -> dict[str, str]:
    return {chain[0]: image for chain, image in zip(chains, best, strict=True)}
