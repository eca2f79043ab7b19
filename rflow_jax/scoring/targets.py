"""The configuration of ``rflow score``, and the images that it names."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.search.inputs import image_files
from rflow_jax.search.prompt_folder import METADATA
from rflow_jax.utils.checks import require_text
from rflow_jax.utils.files import read_bytes
from rflow_jax.utils.json_files import parse_json, read_json_lines
from rflow_jax.verifiers.config import VERIFIERS, NoVerifierConfig, OpenAIVerifierConfig, VerifierConfig


@dataclass(frozen=True)
class ScoreConfig:
    """The images to score, their prompts, and the verifier.

    Attributes:
        images: image files, or folders. With ``prompt`` a folder's own images are scored; without, a folder is one
            of a search or laid out like GenEval's, and every image is scored against its prompt's metadata.jsonl.
        prompt: of all images.
        prompts: JSON lines of {"image", "prompt", ...} instead of both; paths from the file's folder.
        samples: which images of each prompt in a folder: samples, midimg (all of a search), samples_best, nfe4, ...
        out: JSON lines with the whole verdicts. Images whose scores it holds, of the same bytes, prompt and verifier,
            are not scored again.
        again: score all of them again.
        probe: whether a service is asked a first question before anything is loaded; ``--no-probe`` leaves it out.
        verifier: who scores.
    """

    images: list[str] = field(default_factory=list)
    prompt: str | None = None
    prompts: str | None = None
    samples: str = "samples"
    out: str | None = None
    again: bool = False
    probe: bool = True
    verifier: VerifierConfig = field(default_factory=OpenAIVerifierConfig, metadata={"registry": VERIFIERS})

    def __post_init__(self) -> None:
        if self.prompts is None and not self.images:
            raise InputError("no images: give files with --prompt, the folder of a search, or --prompts FILE")
        if self.prompts is not None and (self.images or self.prompt is not None):
            raise InputError("prompts names images and their prompts: leave out the other images and prompt")
        if self.prompt is not None and not self.prompt.strip():
            raise InputError("prompt is empty")
        require_text(self.prompt or "", "prompt")
        if self.prompts is not None and self.out and os.path.realpath(self.out) == os.path.realpath(self.prompts):
            raise InputError("out is the list of prompts: give another file")
        if isinstance(self.verifier, NoVerifierConfig):
            raise InputError("verifier.name is none: name one that scores")


@dataclass(frozen=True)
class Target:
    """One image to score.

    Attributes:
        item: the metadata of its prompt, as verifiers take it.
        error: why it cannot be scored, if that is known without looking at it.
    """

    path: Path
    item: Mapping[str, Any]
    error: str | None = None


def find_targets(config: ScoreConfig) -> list[Target]:
    """The images, in the order in which they are named; those of a folder in the order in which they were made.

    Raises:
        InputError: no such file or folder, none that matches, no image at all, or a file without a prompt.
    """
    if config.prompts is not None:
        return list(_listed(Path(config.prompts)))
    found: list[Target] = []
    for pattern in config.images:  # no shell may have expanded it
        paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise InputError(f"{pattern}: no such file or folder")
        found += [target for path in paths for target in _under(Path(path), config)]
    if not found:
        raise InputError(f"{', '.join(config.images)}: no image there")
    return found


def _under(path: Path, config: ScoreConfig) -> Iterator[Target]:
    if config.prompt is not None:
        files = image_files(path) if path.is_dir() else [path]
        yield from (Target(file, {"prompt": config.prompt}) for file in files)
        return
    if not path.is_dir():
        raise InputError(f"{path}: no prompt to score it against; give --prompt, or --prompts FILE")
    folders = sorted(sub for sub in path.iterdir() if sub.name.isdecimal() and sub.is_dir())
    if not folders:
        raise InputError(f"{path}: no prompts (00000/{METADATA}, ...) there; for a folder of images give --prompt")
    for folder in folders:
        files = image_files(folder / config.samples)
        if not files:
            continue
        metadata = folder / METADATA
        try:
            item, error = _checked(_parsed(metadata), str(metadata))
        except InputError as reason:
            item, error = {}, f"no prompt: {reason}"
        yield from (Target(file, item, error) for file in files)


def _parsed(path: Path) -> Any:
    """The JSON value in a file; raises InputError also where UTF-8 cannot represent it."""
    found = parse_json(read_bytes(path, "prompt"), str(path))
    require_text(json.dumps(found, ensure_ascii=False), str(path))
    return found


def _checked(item: Any, source: str) -> tuple[Mapping[str, Any], str | None]:
    item = item if isinstance(item, dict) else {}
    prompt = item.get("prompt")
    usable = isinstance(prompt, str) and prompt.strip()
    return item, None if usable else f"no prompt: {source} has none"


_EXAMPLE = '{"image": "a.png", "prompt": "a cat"}'


def _listed(path: Path) -> Iterator[Target]:
    for source, entry in read_json_lines(path, "list of images", _EXAMPLE):
        if not isinstance(entry.get("image"), str):
            raise InputError(f"{source}: expected an object such as {_EXAMPLE}")
        if "\0" in entry["image"]:
            raise InputError(f"{source}: image contains a NUL, which no path can")
        item, problem = _checked({key: value for key, value in entry.items() if key != "image"}, source)
        yield Target(path.parent / entry["image"], item, problem)
