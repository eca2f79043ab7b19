"""The parts of a prompt: what a verifier asks about each, and what to do where the answer is no."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rflow_jax.shapes.edits import MAX_SENTENCES, Edit
from rflow_jax.shapes.grammar import NUMBERS, Prompt, Wanted, parse, plural, with_article
from rflow_jax.shapes.scenes import Scene, judge_scene
from rflow_jax.verifiers.base import prompt_of
from rflow_jax.verifiers.findings import Question
from rflow_jax.verifiers.geneval import COUNTING

CONTENT = "What is in this picture?"


class Requirement(NamedTuple):
    """A part of a prompt.

    Attributes:
        question: about a picture, to answer with yes or no.
        remedy: what to do where the answer is no.
        metadata: the part alone, as GenEval's metadata.
        needs: places, in the list of all, of those without which the question makes no sense.
    """

    question: str
    remedy: Edit
    metadata: Mapping[str, Any]
    needs: tuple[int, ...] = ()


def requirements(prompt: Prompt) -> list[Requirement]:
    """The parts of a prompt; a picture is correct if and only if all are met."""
    first = prompt.wanted[0]
    if prompt.tag == COUNTING:
        number = f"{NUMBERS[first.count]} {plural(first.shape)}"
        least = {"tag": COUNTING, "include": [first.entry]}
        most = {"tag": COUNTING, "include": [], "exclude": prompt.metadata["exclude"]}
        return [
            Requirement(f"Are there at least {number}?", Edit("add", first.shape), least),
            Requirement(f"Are there at most {number}?", Edit("remove", first.shape), most),
        ]
    found = [
        Requirement(
            f"Is there {with_article(one.shape)}?", Edit("add", one.noun), Prompt((Wanted(one.shape),)).metadata
        )
        for one in prompt.wanted
    ]
    for place, one in enumerate(prompt.wanted):
        if one.color:
            question, remedy = f"Is the {one.shape} {one.color}?", Edit("color", one.shape, one.color)
            found.append(Requirement(question, remedy, Prompt((one,)).metadata, (place,)))
    if prompt.relation:
        a, b = prompt.wanted
        question = f"Is the {a.shape} {prompt.relation} the {b.shape}?"
        remedy = Edit("move", a.noun, f"{prompt.relation} the {b.noun}")
        alone = Prompt((Wanted(a.shape), Wanted(b.shape)), prompt.relation)
        found.append(Requirement(question, remedy, alone.metadata, (0, 1)))
    return found


def questions(item: Mapping[str, Any]) -> list[Question]:
    """What the verifier ``checklist`` asks about a picture with these metadata.

    Raises:
        InputError: its prompt is none about shapes.
    """
    return [Question(one.question, one.remedy.text, one.needs) for one in requirements(parse(prompt_of(item)))]


def remedies(prompt: Prompt, scene: Scene) -> tuple[Edit, ...]:
    """What to do about the first parts that a scene does not meet; they do not say what is there instead."""
    found = [part.remedy for part, met in sensible(prompt, scene) if not met]
    return tuple(found[:MAX_SENTENCES])


def sensible(prompt: Prompt, scene: Scene) -> list[tuple[Requirement, bool]]:
    """The parts of a prompt that make sense of a scene, and whether it meets them."""
    parts = requirements(prompt)
    met = [judge_scene(part.metadata, scene).correct for part in parts]
    return [(part, ok) for part, ok in zip(parts, met, strict=True) if all(met[place] for place in part.needs)]
