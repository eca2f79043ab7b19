"""Files of a run: written whole or not at all, in the folder layout that GenEval's tools read.

::

    config.yaml                          the resolved configuration
    .config.yaml.{k}.lock                while process k works; the first locks config.yaml itself
    usage.json                           seconds, questions, tokens of all starts (usage_{k}.json: of further processes)
    00000/metadata.jsonl                 the entry of the prompt file
    00000/journal.jsonl                  while the prompt is searched: what has happened so far
    00000/records.jsonl                  when it is done: one record an image, how it was made and what was found
    00000/midimg/{round}_round@{seed}.png    every image
    00000/samples/{k:05d}.png            the images before any correction
    00000/samples_lastround/             the last round of corrections
    00000/samples_path_bestround/        the best of each chain
    00000/samples_best/00000.png         the best of all
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rflow_jax.chat import png_bytes
from rflow_jax.errors import InputError
from rflow_jax.files import beginning_of, remove_beginnings, write_file
from rflow_jax.images import read_image
from rflow_jax.search.chains import Sample, Seed, best_of_all, best_of_chains, chains, is_correction, last_round
from rflow_jax.search.journal import JOURNAL, Journal, json_line
from rflow_jax.verifiers.ranking import rated

RECORDS, METADATA = "records.jsonl", "metadata.jsonl"
SAMPLES, LAST_ROUND, BEST_OF_CHAINS, BEST = "samples", "samples_lastround", "samples_path_bestround", "samples_best"
_PNG_END = b"IEND\xaeB`\x82"


class PromptFolder:
    """The folder of one prompt.

    Raises:
        InputError: it holds another prompt.
    """

    def __init__(self, out: Path, index: int, entry: Mapping[str, Any]) -> None:
        self.path = folder_of(out, index)
        self.index = index
        self.entry = entry
        remove_beginnings(self.path)
        if (self.path / METADATA).exists():
            check_entry(out, index, entry)
        else:
            write_file(self.path / METADATA, json_line(entry))
        self.journal = Journal(self.path / JOURNAL)

    @staticmethod
    def image_name(round_number: int, seed: Seed) -> str:
        """Where an image lies in the folder; ``--seed`` of ``generate`` takes the seed as it stands there."""
        return f"midimg/{round_number}_round@{'-'.join(map(str, seed))}.png"

    def has_image(self, name: str) -> bool:
        """Whether the image is there, to its last byte."""
        try:
            with open(self.path / name, "rb") as file:
                file.seek(-len(_PNG_END), os.SEEK_END)
                return file.read() == _PNG_END
        except OSError:
            return False

    def read_image(self, name: str) -> Image:
        """An image that was stored."""
        return read_image(self.path / name)

    def write_image(self, name: str, image: Image) -> None:
        """Stores an image as PNG."""
        write_file(self.path / name, png_bytes(image))

    def finish(
        self, samples: Sequence[Sample], made_with: Mapping[str, Any], verified: bool, count_first: bool = True
    ) -> None:
        """Fills the folders of results and writes the records; they are the sign that the prompt is done."""
        verdicts = rated([sample.verdict for sample in samples])
        samples = [replace(sample, verdict=verdict) for sample, verdict in zip(samples, verdicts, strict=True)]
        first = [position for position, sample in enumerate(samples) if not is_correction(sample)]
        self._place(SAMPLES, samples, first)
        if chains(samples):
            self._place(LAST_ROUND, samples, last_round(samples))
            self._place(BEST_OF_CHAINS, samples, best_of_chains(samples, count_first))
        if verified:
            self._place(BEST, samples, [best_of_all(samples, count_first)])
        lines = (json_line(self._record(samples, position, made_with)) for position in range(len(samples)))
        write_file(self.path / RECORDS, "".join(lines))
        self.journal.remove()

    def _place(self, folder: str, samples: Sequence[Sample], chosen: Sequence[int]) -> None:
        (self.path / folder).mkdir(exist_ok=True)
        for number, position in enumerate(chosen):
            link(self.path / samples[position].file, self.path / folder / f"{number:05d}.png")

    def _record(self, samples: Sequence[Sample], position: int, made_with: Mapping[str, Any]) -> dict[str, Any]:
        sample = samples[position]
        own = asdict(sample) | {"noise_path": [list(seed) for seed in sample.noise_path], "seed": list(sample.seed)}
        parent = None if sample.parent is None else samples[sample.parent].file
        # The base model alone makes what is no correction.
        lora = {"lora": made_with["lora"] if is_correction(sample) else None}
        where = {"index": self.index, "id": position, "prompt": self.entry["prompt"]}
        return where | own | {"parent_file": parent} | dict(made_with) | lora


def folder_of(out: Path, index: int) -> Path:
    """The folder of a prompt."""
    return out / f"{index:05d}"


def is_done(out: Path, index: int) -> bool:
    """Whether the search of a prompt is finished."""
    folder = folder_of(out, index)
    # A kill between the records and the end of the journal leaves both: then it is finished once more.
    return (folder / RECORDS).exists() and not (folder / JOURNAL).exists()


def check_entry(out: Path, index: int, entry: Mapping[str, Any]) -> None:
    """Makes sure that a prompt's folder belongs to this prompt; one that is not there yet does.

    Raises:
        InputError: it belongs to another one.
    """
    path = folder_of(out, index) / METADATA
    if not path.exists():
        return
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == dict(entry)
    except ValueError:
        same = False
    if not same:
        raise InputError(f"{path}: another prompt than number {index} of the prompt file; give another --out")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a prompt that is done, in the order of their images.

    Raises:
        InputError: a line is no record; says which.
    """
    path = folder / RECORDS
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            record = json.loads(line)
            records.append({**record, "file": record["file"], "round": int(record["round"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: no record of an image ({error})") from error
    return records


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links; never half a file."""
    temporary = beginning_of(target)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # replacing a name by another of the same file leaves both
