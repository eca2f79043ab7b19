"""Questions about the parts of a prompt, and their answers in words: what a checklist finds and a writer reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

KEEP = "Keep everything."  # a reflection where there is nothing to do
_LINE = re.compile(r"^\s*(yes|no): [^?\n]+\?[ \t]*(.*?)[ \t]*$", re.MULTILINE)


class Question(NamedTuple):
    """A question about a picture, to answer with yes or no.

    Attributes:
        text: ends in its only question mark.
        remedy: what to do where the answer is no, one sentence; may be empty.
        needs: places, in the list of all, of those without which the question makes no sense.
    """

    text: str
    remedy: str = ""
    needs: tuple[int, ...] = ()


class Finding(NamedTuple):
    """The answer to a question, and the probability of a yes."""

    question: Question
    met: bool
    probability: float


def in_words(findings: Sequence[Finding]) -> str:
    """One line each: the answer, the question, and after a no its remedy; without those that make no sense."""
    lines = []
    for finding in findings:
        question = finding.question
        if finding.met:
            lines.append(f"yes: {question.text}")
        elif all(findings[place].met for place in question.needs):
            lines.append(f"no: {question.text} {question.remedy}".rstrip())
    return "\n".join(lines)


def as_reflection(remedies: Sequence[str], sentences: int = 2) -> str:
    """The first remedies as a reflection, one sentence each; :data:`KEEP` where there is none."""
    return " ".join(remedies[:sentences]) or KEEP


def remedies_in(evaluation: str) -> list[str] | None:
    """What to do about each no of :func:`in_words`, wherever it stands in a text; None if it has no such lines."""
    lines = _LINE.findall(evaluation)
    return [remedy for answer, remedy in lines if answer == "no" and remedy] if lines else None
