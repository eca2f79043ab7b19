"""Reads the folder of a search: its images in the order in which they were made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.utils.atomic_io import inside
from rflow_jax.utils.images import PictureError, size_in
from rflow_jax.utils.json_files import read_json, read_records
from rflow_jax.utils.yaml_files import read_yaml
from rflow_jax.verifiers.base import EnsembleVerdict, MemberVerdict, Verdict
from rflow_jax.verifiers.ranking import best_first, with_ensemble_scores

_PROMPT_FOLDER = re.compile(r"\d{5,}")
_TEXT, _NUMBER, _MAYBE_TEXT = (str,), (int,), (str, type(None))
_RECORD = {
    "file": _TEXT,
    "prompt": _TEXT,
    "round": _NUMBER,
    "branch": _NUMBER,
    "stage": _TEXT,
    "parent": (int, type(None)),
    "refined_prompt": _MAYBE_TEXT,
    "reflection": _MAYBE_TEXT,
    "text_errors": (list, type(None)),
    "verdict": (dict, type(None)),
    "error": _MAYBE_TEXT,
}
_VERDICT = {
    "score": (int, float, type(None)),
    "label": _MAYBE_TEXT,
    "explanation": _MAYBE_TEXT,
    "error": _MAYBE_TEXT,
    "members": (list, type(None)),
}
_MEMBER = {"name": _TEXT, "weight": (int, float), "verdict": (dict,)}


@dataclass(frozen=True)
class Picture:
    """One image of a prompt.

    Attributes:
        file: relative to the prompt's folder.
        size: width and height in pixels; None if the file is missing or not an image.
        stage: "noise", "prompt", "reflect", "neighbour" or "given".
        parent: position of the picture that it corrects.
        verdict: None if no verifier looked at it.
        error: why it could not be made.
    """

    file: str
    size: tuple[int, int] | None
    round: int
    branch: int
    stage: str
    parent: int | None = None
    refined_prompt: str | None = None
    reflection: str | None = None
    text_errors: tuple[str, ...] = ()
    verdict: Verdict | None = None
    error: str | None = None

    @property
    def scored(self) -> bool:
        """Whether there is a score to compare."""
        return self.verdict is not None and self.verdict.scored


@dataclass(frozen=True)
class Prompt:
    """One prompt and its pictures, at least one."""

    folder: str
    text: str
    tag: str | None
    pictures: tuple[Picture, ...]

    def best(self, count: int | None = None) -> int | None:
        """Position of the best of the first ``count`` pictures (all by default); ties go to the first made."""
        best = best_first([picture.verdict for picture in self.pictures[:count]])[0]
        return best if self.pictures[best].scored else None


@dataclass(frozen=True)
class SearchRun:
    """One search.

    Attributes:
        config: content of ``config.yaml``.
        usage: content of ``usage.json``: ``seconds`` and ``cost`` (in dollars), where they are known.
        prompts: those that are finished, in the order of their folders.
        running: how many are not.
    """

    folder: Path
    config: Mapping[str, Any]
    usage: Mapping[str, float]
    prompts: tuple[Prompt, ...]
    running: int

    @cached_property
    def verified(self) -> bool:
        """Whether a verifier judged any image."""
        return any(picture.verdict for prompt in self.prompts for picture in prompt.pictures)

    @cached_property
    def decides(self) -> bool:
        """Whether its verifier says yes or no."""
        verdicts = (picture.verdict for prompt in self.prompts for picture in prompt.pictures)
        return any(verdict and verdict.label for verdict in verdicts)

    @property
    def images(self) -> int:
        """Pictures of all finished prompts."""
        return sum(len(prompt.pictures) for prompt in self.prompts)

    @property
    def unscored(self) -> int:
        """Pictures that a verifier should have scored and did not."""
        unscored = sum(not picture.scored for prompt in self.prompts for picture in prompt.pictures)
        return unscored if self.verified else 0

    @property
    def unmade(self) -> int:
        """Pictures that could not be made."""
        return sum(picture.error is not None for prompt in self.prompts for picture in prompt.pictures)

    @property
    def most(self) -> int:
        """Pictures of the prompt that has most."""
        return max(len(prompt.pictures) for prompt in self.prompts)


def read_runs(folders: Sequence[Path]) -> list[SearchRun]:
    """Reads searches.

    Raises:
        InputError: no folder, one that contains no search, no finished prompt, or a file that cannot be read.
    """
    if not folders:
        raise InputError("no folder: give the --out of one or more searches")
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> SearchRun:
    """Reads one search; raises as :func:`read_runs`."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the --out of a search")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: not the folder of a search (no config.yaml); give the --out of a search")
    begun = sorted(path for path in folder.iterdir() if _PROMPT_FOLDER.fullmatch(path.name) and path.is_dir())
    finished = [prompt for path in begun if (prompt := _read_prompt(path))]
    if not finished:
        raise InputError(f"{folder}: no prompt is finished yet ({len(begun)} begun); report on it later")
    config = read_yaml(folder / "config.yaml", "configuration")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.yaml'}: expected keys with values")
    usage = read_json(folder / "usage.json") if (folder / "usage.json").exists() else {}
    known = usage.items() if isinstance(usage, dict) else ()
    usage = {key: float(value) for key, value in known if type(value) in (int, float)}
    return SearchRun(folder, config, usage, tuple(finished), len(begun) - len(finished))


def _read_prompt(folder: Path) -> Prompt | None:
    """None for a prompt that is not finished."""
    records = folder / "records.jsonl"
    if not records.exists():
        return None
    text, pictures = "", []
    for source, record in read_records(records, "records"):
        try:
            pictures.append(_picture(record, folder, len(pictures)))
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error
        text = record["prompt"]
    if not pictures:
        return None
    verdicts = with_ensemble_scores([picture.verdict for picture in pictures])
    pictures = [replace(picture, verdict=verdict) for picture, verdict in zip(pictures, verdicts, strict=True)]
    metadata = folder / "metadata.jsonl"
    entries = read_records(metadata, "prompt") if metadata.exists() else iter(())
    _, entry = next(entries, ("", {}))
    tag = entry.get("tag")
    return Prompt(folder.name, text, tag if isinstance(tag, str) and tag else None, tuple(pictures))


def _picture(record: Mapping[str, Any], folder: Path, position: int) -> Picture:
    _check(record, _RECORD)
    file, parent, verdict = inside(folder, record["file"]), record.get("parent"), record.get("verdict")
    if parent is not None and not 0 <= parent < position:
        raise ValueError(f"parent is {parent}, which is not an earlier record")
    try:
        size = size_in(file)
    except PictureError:
        size = None
    return Picture(
        file=record["file"],
        size=size,
        round=record["round"],
        branch=record["branch"],
        stage=record["stage"],
        parent=parent,
        refined_prompt=record.get("refined_prompt"),
        reflection=record.get("reflection"),
        text_errors=tuple(map(str, record.get("text_errors") or ())),
        verdict=None if verdict is None else _verdict(verdict),
        error=record.get("error"),
    )


def _verdict(stored: Mapping[str, Any]) -> Verdict:
    _check(stored, _VERDICT)
    score = stored.get("score")
    known = {
        "score": None if score is None else float(score),
        "label": stored.get("label"),
        "explanation": stored.get("explanation") or "",
        "error": stored.get("error"),
    }
    if stored.get("members") is None:
        return Verdict(**known)
    for member in stored["members"]:
        _check(member if isinstance(member, dict) else {}, _MEMBER)
    members = (MemberVerdict(one["name"], one["weight"], _verdict(one["verdict"])) for one in stored["members"])
    return EnsembleVerdict(**known, members=tuple(members))


def _check(record: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    for key, allowed in kinds.items():
        value = record.get(key)
        if not isinstance(value, allowed):
            raise ValueError(f"{key} is {value!r:.80}" if key in record else f"no {key}")
