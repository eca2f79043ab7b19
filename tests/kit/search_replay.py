"""Replays of the original's recorded searches by ours.

``tests/golden_search`` holds what the original's own scripts decided on scripted scores; its README says how each
trace was recorded and what ``shows`` means. A replay gives our search the same scores. Images go by the original's
names: ours numbers the branches of a round by chain, the original by score, so a child is known by its parent.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from PIL.Image import Image

from rflow_jax.search.lineage import best_of_chains, chains
from rflow_jax.search.prompt_folder import BEST, BEST_OF_CHAINS, LAST_ROUND, SAMPLES, PromptFolder
from rflow_jax.search.prompt_search import PromptSearch, SearchContext, SearchTask
from rflow_jax.search.strategies import Corrections, FreshNoise, GivenImages, RefinedPrompts, Strategy
from rflow_jax.verifiers.base import Verdict
from rflow_jax.writers.base import WriterInput, WriterOutput

Trace = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "golden_search"


def strategy_of(trace: Trace) -> Strategy:
    """Our search of the trace's settings; a reflection begins with the images that the original read."""
    size = trace["settings"]["rounds"], trace["settings"]["branches"]
    match trace["script"]:
        case "tts_t2i_noise_scaling.py":
            return Strategy((FreshNoise(*size),))
        case "tts_t2i_noise_prompt_scaling.py":
            return Strategy((RefinedPrompts(*size),))
        case _:
            return Strategy((GivenImages(1, len(trace["start_order"])), Corrections(*size)))


def verdict(entry: Sequence[Any] | None) -> Verdict:
    """A scripted score as our verifiers say it; None is a failure."""
    if entry is None:
        return Verdict(None, error="scripted failure")
    first, second = entry
    return Verdict(float(second), first) if first in ("yes", "no") else Verdict(float(first), explanation=second)


def picture(name: str) -> Image:
    """A picture that says which image it is."""
    number, branch = name[1:].split(".")
    return PIL.Image.new("RGB", (1, 1), (ord(name[0]), int(number), int(branch)))


def name_of(image: Image) -> str:
    """The reverse of ``picture``."""
    kind, number, branch = image.getpixel((0, 0))  # type: ignore
    return f"{chr(kind)}{number}.{branch}"


@dataclass
class Replay:
    """Our search in the original's names of the images; the lists are by round of correction.

    Attributes:
        told: what the models that write were told for an image, by step.
        prompts: the refined prompt and the reflection that an image was made from.
        chains: after each round, as ``best_of_chains``.
        placed: the images in each folder of results.
        scored: how often each image was scored.
    """

    parents: list[list[str]] = field(default_factory=list)
    parent_of: dict[str, str] = field(default_factory=dict)
    told: dict[str, dict[str, WriterInput]] = field(default_factory=lambda: defaultdict(dict))
    prompts: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    chains: list[list[list[str]]] = field(default_factory=list)
    best_of_chains: list[list[str]] = field(default_factory=list)
    placed: dict[str, list[str]] = field(default_factory=dict)
    scored: Counter[str] = field(default_factory=Counter)

    @property
    def best(self) -> str:
        """The best of all."""
        (name,) = self.placed[BEST]
        return name


class _Player:
    """Does the work that our search asks for, by the trace."""

    def __init__(self, trace: Trace, folder: Path, include_initial_images: bool, unscored: str | None) -> None:
        given = [folder / f"{name}.png" for name in trace.get("start_order", ())]
        for path in given:
            picture(path.stem).save(path)
        verified = bool(trace["scores"])
        terms = SearchContext(0, verified, 0, 0.95, include_initial_images, {"lora": None})
        entry = {"prompt": trace["prompt"]}
        self.run = PromptSearch(PromptFolder(folder, trace["prompt_index"], entry), strategy_of(trace), terms, given)
        self.trace, self.unscored = trace, unscored
        self.result, self.names = Replay(), list[str]()

    def play(self) -> None:
        works = self.run.begin()
        while works:
            self._name()
            work = works.pop()
            works += self.run.done(work, self._do(work))
        self._name()

    def _name(self) -> None:
        """Gives new images their names: the original's child of the parent, or else one not taken yet."""
        for sample in self.run.samples[len(self.names) :]:
            if sample.stage == "given":
                self.names.append(self.trace["start_order"][sample.branch])
                continue
            if sample.stage != "reflect":
                self.names.append(f"n{sample.round + 1}.{sample.branch}")
                continue
            assert sample.parent is not None
            parent = self.names[sample.parent]
            children = self.trace["rounds"][sample.round - 1]["children"]
            free = [child for child in children if child["image"] not in self.names]
            own = next((child for child in free if child["parent"] == parent), free[0])
            self.names.append(own["image"])

    def _do(self, work: SearchTask) -> WriterOutput | Verdict | None:
        name, result = self.names[work.position], self.result
        match work.step:
            case "reflect" | "refine":
                result.told[work.step][name] = self.run.case(work)
                return WriterOutput(self._text(work.step, name))
            case "draw":
                request = self.run.request(work)
                result.prompts[name] = request.refined_prompt, request.reflection
                if request.condition is not None:
                    result.parent_of[name] = name_of(request.condition)
                self.run.folder.write_image(self.run.place(work), picture(name))
                return None
            case "take":
                self.run.folder.write_image(self.run.place(work), self.run.given_image(work))
                return None
            case "score":
                result.scored[name] += 1
                return verdict(None if name == self.unscored else self.trace["scores"][name])

    def _text(self, step: str, name: str) -> str:
        """What the original's models wrote for this image."""
        row = self.trace["rounds"][int(name[1:].split(".")[0]) - 1]
        if "children" in row:
            child = next(child for child in row["children"] if child["image"] == name)
            return child["reflection" if step == "reflect" else "refined_prompt"] or ""
        return next(image["prompt"] for image in row["images"] if image["image"] == name)


def replay(trace: Trace, folder: Path, include_initial_images: bool = False, unscored: str | None = None) -> Replay:
    """Our search with the trace's settings and scores; scoring ``unscored`` fails."""
    player = _Player(trace, folder, include_initial_images, unscored)
    player.play()
    assert player.run.finished
    result, names = player.result, player.names
    for number in range(1, trace["settings"]["rounds"] + 1) if "start_order" in trace else ():
        samples = [sample for sample in player.run.samples if sample.round <= number]
        first = 0 if include_initial_images else 1
        result.chains.append([[names[position] for position in chain[first:]] for chain in chains(samples)])
        result.best_of_chains.append([names[position] for position in best_of_chains(samples, include_initial_images)])
        newest = [name for name, sample in zip(names, samples, strict=False) if sample.round == number]
        result.parents.append([result.parent_of[name] for name in newest])
    for place in (SAMPLES, LAST_ROUND, BEST_OF_CHAINS, BEST):
        files = sorted((player.run.folder.path / place).glob("*.png"))
        result.placed[place] = [name_of(PIL.Image.open(file)) for file in files]
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
