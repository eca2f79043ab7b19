"""GenEval's rules: whether what a detector found in an image is what the prompt's metadata asks for.

The detector and the classifier of colours are arguments, so that the rules serve photographs and drawn shapes alike.
Source: GenEval (Ghosh et al., 2023), ``evaluate_images.py`` of its repository at af4902f.

``python -m rflow_jax.verifiers.geneval FILE`` compares the decisions with recorded ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.utils import cli
from rflow_jax.utils.json_files import read_json

COUNTING = "counting"
RELATIONS = ("left of", "right of", "above", "below")


class Detection(NamedTuple):
    """One object that a detector found.

    Attributes:
        box: x0, y0, x1, y1 in pixels; y grows downwards.
        score: the detector's confidence, 0 to 1.
        mask: what the classifier of colours needs, if anything.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: Any = None


Detections = Mapping[str, Sequence[Detection]]  # by class
ColorsOf = Callable[[str, Sequence[Detection]], Sequence[str]]  # (class, its objects) -> a color for each


@dataclass(frozen=True)
class Rules:
    """The thresholds; the defaults are those of GenEval's published numbers.

    Attributes:
        threshold: an object counts if its score is greater.
        counting_threshold: the same for prompts with the tag "counting".
        max_objects: of each class, the most confident ones.
        max_overlap: objects whose box overlaps that of a more confident one of their class by at least this IoU do not
            count; 1 keeps all.
        position_margin: the share of the two boxes' sizes by which centers must differ.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_margin: float = 0.1


class Failure(NamedTuple):
    """One requirement that an image does not meet.

    Attributes:
        requirement: "count", "color", "position" or "exclude".
        entry: its number in the metadata's ``include`` or ``exclude``.
        text: what was expected and what was found.
    """

    requirement: str
    entry: int
    text: str


@dataclass(frozen=True)
class Decision:
    """What the rules say of an image: correct if nothing failed."""

    failures: tuple[Failure, ...] = field(default=())

    @property
    def correct(self) -> bool:
        return not self.failures


def objects_that_count(found: Detections, tag: str, rules: Rules = Rules()) -> dict[str, list[Detection]]:
    """The objects that count for a prompt with this tag, by class, most confident first; no empty classes."""
    threshold = rules.counting_threshold if tag == COUNTING else rules.threshold
    counted: dict[str, list[Detection]] = {}
    for name, detections in found.items():
        # Among equal scores the last comes first, as in the original, which reverses an ascending order.
        order = np.argsort([detection.score for detection in detections], kind="stable")[::-1]
        confident = [detections[i] for i in order if detections[i].score > threshold][: rules.max_objects]
        kept: list[Detection] = []
        for detection in confident:
            if rules.max_overlap >= 1 or all(iou(other.box, detection.box) < rules.max_overlap for other in kept):
                kept.append(detection)
        if kept:
            counted[name] = kept
    return counted


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, whose corners are pixels that belong to them."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - common
    return common / union if union else 0.0


def relations_of(a: Sequence[float], b: Sequence[float], margin: float = 0.1) -> set[str]:
    """Where box ``a`` lies of box ``b``: none to two of :data:`RELATIONS`.

    Centers must differ by more than ``margin`` of both sizes together, and what is beyond it must make up more than
    half of their distance.
    """
    corners = np.asarray([a, b], np.float64).reshape(2, 2, 2)  # box, corner, axis
    centers = corners.mean(axis=1)
    sizes = np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    beyond = np.maximum(np.abs(offset) - margin * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, true in zip(RELATIONS, holds, strict=True) if true}


def decide(metadata: Mapping[str, Any], found: Detections, colors_of: ColorsOf, rules: Rules = Rules()) -> Decision:
    """Decides whether an image shows what its prompt asks for.

    Args:
        metadata: a line of GenEval's prompt file: ``tag``, ``include``, and optionally ``exclude``.
        found: every detection, whatever its score.
        colors_of: called with the objects of an entry that names a color.

    Raises:
        InputError: the metadata is not GenEval's.
    """
    try:
        return _decide(metadata, objects_that_count(found, metadata["tag"], rules), colors_of, rules)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"metadata is not that of a GenEval prompt ({type(error).__name__}: {error})") from None


def _decide(
    metadata: Mapping[str, Any], counted: Mapping[str, Sequence[Detection]], colors_of: ColorsOf, rules: Rules
) -> Decision:
    failures: list[Failure] = []
    groups: list[Sequence[Detection] | None] = []  # of each entry its objects; None if it failed
    for index, entry in enumerate(metadata.get("include", ())):
        objects = list(counted.get(entry["class"], ()))[: entry["count"]]
        failure = _failure(index, entry, objects, groups, colors_of, rules)
        groups.append(None if failure else objects)
        failures += [failure] if failure else []
    for index, entry in enumerate(metadata.get("exclude", ())):
        count = len(counted.get(entry["class"], ()))
        if count >= entry["count"]:
            text = f"expected fewer than {entry['count']} of {entry['class']}, found {count}"
            failures.append(Failure("exclude", index, text))
    return Decision(tuple(failures))


def _failure(
    index: int,
    entry: Mapping[str, Any],
    objects: Sequence[Detection],
    groups: Sequence[Sequence[Detection] | None],
    colors_of: ColorsOf,
    rules: Rules,
) -> Failure | None:
    """What is wrong with an entry's objects; None if nothing is."""
    name, count = entry["class"], entry["count"]
    if len(objects) < count:
        return Failure("count", index, f"expected {count} of {name}, found {len(objects)}")
    if "color" in entry:
        colors = list(colors_of(name, objects))
        if colors.count(entry["color"]) < count:
            return Failure("color", index, f"expected {count} {entry['color']} of {name}, found {', '.join(colors)}")
    if "position" in entry:
        relation, target = entry["position"]
        others = groups[target]
        if others is None:
            return Failure("position", index, f"nothing that {name} could be {relation}")
        for one in objects:
            for other in others:
                if relation not in (found := relations_of(one.box, other.box, rules.position_margin)):
                    text = f"expected {name} {relation} the other, found {' and '.join(sorted(found)) or 'neither'}"
                    return Failure("position", index, text)
    return None


def compare(file: Path) -> str:
    """Decides every recorded case again.

    Args:
        file: a JSON list of {metadata, detections: {class: [[x0, y0, x1, y1, score], ...]}, colors: {class: [color of
            each detection]}, correct, kept: {class: boxes}}.

    Raises:
        InputError: a case that is decided otherwise, or is none; the message says which.
    """
    cases = read_json(file)
    if not isinstance(cases, list):
        raise InputError(f"{file}: expected a list of recorded decisions")
    for number, case in enumerate(cases):
        try:
            decision, agrees = _decide_again(case)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: case {number} is no recorded decision ({error!r})") from None
        if not agrees:
            found = "; ".join(failure.text for failure in decision.failures) or "correct"
            raise InputError(f"{file}: case {number} of {len(cases)} is decided otherwise ({found})")
    return f"{len(cases)} of {len(cases)} decisions agree"


def _decide_again(case: Mapping[str, Any]) -> tuple[Decision, bool]:
    """Our decision of a recorded case, and whether it is the recorded one."""
    found: dict[str, list[Detection]] = {}
    for name, boxes in case["detections"].items():
        colors = case["colors"][name]
        found[name] = [Detection(tuple(box[:4]), box[4], mask=color) for box, color in zip(boxes, colors, strict=True)]
    counted = objects_that_count(found, case["metadata"]["tag"])
    decision = decide(case["metadata"], found, lambda _, objects: [detection.mask for detection in objects])
    kept = {name: [[*detection.box, detection.score] for detection in objects] for name, objects in counted.items()}
    return decision, kept == case["kept"] and decision.correct == case["correct"]


def main(argv: Sequence[str]) -> int:
    """The module as a command."""
    if len(argv) != 1:
        raise InputError("usage: python -m rflow_jax.verifiers.geneval FILE")
    print(compare(Path(argv[0])))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(sys.argv[1:])))
