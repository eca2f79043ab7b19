"""Files of a run: written whole or not at all, in the folder layout that GenEval's tools read.

::

    config.yaml                          the resolved configuration
    00000/metadata.jsonl                 the entry of the prompt file
    00000/records.jsonl                  one record an image: how it was made, and what was found about it
    00000/midimg/{round}_round@{seed}.png    every image
    00000/samples/{k:05d}.png            the images from noise alone
    00000/samples_lastround/             the last round of corrections
    00000/samples_path_bestround/        the best of each chain
    00000/samples_best/00000.png         the best of all
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from PIL.Image import Image

from rflow_jax.chat import png_bytes
from rflow_jax.errors import InputError
from rflow_jax.files import write_file
from rflow_jax.search.chains import Sample, Seed, best_first, chains, last_round

RECORDS = "records.jsonl"


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON, readable in any script."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def claim_folder(out: Path) -> None:
    """Makes the folder of a new run.

    Raises:
        InputError: the folder holds files already, cannot be made, or cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = any(out.iterdir())
        # Said now, and not after the model has been loaded.
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"{out}: cannot use this folder ({error.strerror})") from error
    if taken:
        raise _taken(out)


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Writes ``config.yaml``, the first file of a run, once the model is there.

    Raises:
        InputError: another run has begun in this folder since it was claimed.
    """
    try:
        # Made by one of two runs only, however close they are.
        with open(out / "config.yaml", "x", encoding="utf-8") as file:
            yaml.safe_dump(config, file, sort_keys=False)
    except FileExistsError as error:
        raise _taken(out) from error


def _taken(out: Path) -> InputError:
    return InputError(f"{out}: holds files of another run; give an empty or new folder as --out")


class PromptFolder:
    """The folder of one prompt."""

    def __init__(self, out: Path, index: int, entry: Mapping[str, Any]) -> None:
        self.path = out / f"{index:05d}"
        self.index = index
        self.entry = entry
        write_file(self.path / "metadata.jsonl", json_line(entry))

    @staticmethod
    def image_name(round_number: int, seed: Seed) -> str:
        """Where an image lies in the folder; ``--seed`` of ``generate`` takes the seed as it stands there."""
        return f"midimg/{round_number}_round@{'-'.join(map(str, seed))}.png"

    def write_image(self, name: str, image: Image) -> None:
        """Stores an image as PNG."""
        write_file(self.path / name, png_bytes(image))

    def write_records(self, samples: Sequence[Sample], made_with: Mapping[str, Any]) -> None:
        """Replaces the records by those of all samples so far."""
        lines = (json_line(self._record(samples, position, made_with)) for position in range(len(samples)))
        write_file(self.path / RECORDS, "".join(lines))

    def place_results(self, samples: Sequence[Sample], verified: bool) -> None:
        """Fills the folders of results from the images."""
        first = [position for position, sample in enumerate(samples) if sample.parent is None]
        self._place("samples", samples, first)
        lines = chains(samples)
        if lines:
            self._place("samples_lastround", samples, last_round(samples))
            self._place("samples_path_bestround", samples, [best_first(samples, line)[0] for line in lines])
        if verified:
            self._place("samples_best", samples, best_first(samples, range(len(samples)))[:1])

    def _place(self, folder: str, samples: Sequence[Sample], chosen: Sequence[int]) -> None:
        (self.path / folder).mkdir(exist_ok=True)
        for number, position in enumerate(chosen):
            _link(self.path / samples[position].file, self.path / folder / f"{number:05d}.png")

    def _record(self, samples: Sequence[Sample], position: int, made_with: Mapping[str, Any]) -> dict[str, Any]:
        sample = samples[position]
        return {
            "index": self.index,
            "id": position,
            "file": sample.file,
            "prompt": self.entry["prompt"],
            "round": sample.round,
            "branch": sample.branch,
            "seed": list(sample.seed),
            "parent": sample.parent,
            "parent_file": None if sample.parent is None else samples[sample.parent].file,
            "refined_prompt": sample.refined_prompt,
            "reflection": sample.reflection,
            "text_errors": list(sample.text_errors),
            "verdict": None if sample.verdict is None else asdict(sample.verdict),
            **made_with,
            # The base model alone makes the noise stage's images.
            "lora": made_with["lora"] if sample.parent is not None else None,
        }


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links; never half a file."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
