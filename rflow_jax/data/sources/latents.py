"""GenRef as precomputed latents and text embeddings, so that training runs no encoder.

::

    settings.json                       the settings of the encoders
    shared.safetensors                  a black condition, and T5 of an empty text
    {subset}-{first:08d}.safetensors    64 records: {number}.good_mean and so on; their texts are in the header
    complete.json                       the number of records; written last, and without it the data set is incomplete
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from rflow_jax.data.config import DataConfig
from rflow_jax.data.loader import Loader, RecordSampler, WorkerResult, texts_of
from rflow_jax.data.records import SUBSETS, RecordError
from rflow_jax.data.sampling import SampleRef
from rflow_jax.data.transforms import SHORTEST_REFLECTION, Drops, draw_drops, t5_text
from rflow_jax.errors import InputError
from rflow_jax.utils.json_files import parse_json, read_object
from rflow_jax.utils.ranges import BatchSize, Tokens, require_ranges
from rflow_jax.weights.safetensors_io import TensorFiles

SETTINGS, SHARED, COMPLETE = "settings.json", "shared.safetensors", "complete.json"
RECORDS_IN_FILE = 64  # about 0.7 GB of FLUX.1-dev's in bfloat16
FORMAT = 1
_KEPT_HEADERS = 256


@dataclass(frozen=True)
class PrecomputeConfig:
    """The records to encode, and the model.

    Attributes:
        model: the pipeline whose encoders are used: a converted or diffusers-layout folder, or a Hub id.
        out: folder; a command that was interrupted goes on when it is given again.
        data: the records, tar or tfds, and their sizes; its crop must be ``center``, unless all pictures are square.
        dtype: of the encoders, and of what is kept; training must use the same.
        batch_size: records that are encoded together, rounded up to a multiple of the devices.
        max_sequence_length: T5 tokens; null takes the model's own.
    """

    model: str
    out: str
    data: DataConfig
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_size: BatchSize = 8
    max_sequence_length: Tokens | None = None

    def __post_init__(self) -> None:
        require_ranges(self)


@dataclass(frozen=True)
class LatentMetadata:
    """How latents and embeddings were made; ``identity`` is the encoders', ``fingerprint`` the records'."""

    model: str
    identity: str
    target_size: int
    condition_size: int
    crop: str
    text_length: int
    dtype: str
    fingerprint: str
    format: int = FORMAT


class LatentEntry(NamedTuple):
    """A record's texts; ``trouble`` says why it cannot be used and is empty if it can."""

    key: str
    prompt: str
    reflection: str
    trouble: str = ""

    @property
    def has_reflection(self) -> bool:
        """Whether T5 gets the reflection."""
        return len(self.reflection.strip()) >= SHORTEST_REFLECTION

    @property
    def texts(self) -> tuple[str, str]:
        """T5's with the reflection, and without it."""
        both = (Drops(text=False, image=False, reflection=drop) for drop in (not self.has_reflection, True))
        first, second = (t5_text(self.prompt, self.reflection, drops) for drops in both)
        return first, second


class Latents(NamedTuple):
    """A sample after the encoders, on the host, in the dtype of the files.

    Attributes:
        good, bad: (mean, log variance) of the autoencoder's posterior, [y, x, z] each.
        pooled: [p].
        text: [t, e].
    """

    good: tuple[np.ndarray, np.ndarray]
    bad: tuple[np.ndarray, np.ndarray]
    pooled: np.ndarray
    text: np.ndarray


class LatentExample(NamedTuple):
    """One training example: its latents, and what they were made from."""

    latents: Latents
    prompt: str
    t5_text: str
    key: str
    subset: str


class LatentBatch(NamedTuple):
    """This process's samples of one optimizer step: a ``HostBatch`` with latents instead of images."""

    step: int
    numbers: np.ndarray
    latents: Latents
    prompts: list[str]
    t5_texts: list[str]
    subsets: list[str]
    skipped: list[str]
    waited: float
    digest: str


class LatentSource:
    """Random access to the files of a folder; can be pickled.

    Raises:
        InputError: the folder is missing or incomplete.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = read_settings(folder)
        if not (folder / COMPLETE).exists():
            raise InputError(f"{folder}: not all records are encoded yet; give the same precompute command again")
        counts = _read_json(folder / COMPLETE)
        self.counts: Mapping[str, int] = {name: counts.get(name, 0) for name in SUBSETS}
        if wrong := [name for name, count in self.counts.items() if type(count) is not int or count < 0]:
            raise InputError(f"{folder / COMPLETE}: {wrong[0]} is {counts[wrong[0]]!r}; expected a number of records")
        shared = TensorFiles.open(folder / SHARED)
        self._black = (shared.read("black_mean"), shared.read("black_logvar"))
        self._empty_text = shared.read("empty_text")

    @property
    def fingerprint(self) -> str:
        """That of the records it was made from: a run may continue with either."""
        return self.settings.fingerprint

    def entry(self, subset: str, index: int) -> LatentEntry:
        """The texts of a record; raises InputError if its file is missing or damaged."""
        if not 0 <= index < self.counts[subset]:
            raise IndexError(f"{subset} {index}: there are {self.counts[subset]} records")
        return _open_file(self.folder / file_name(subset, index))[1][index % RECORDS_IN_FILE]

    def read(self, subset: str, index: int, drops: Drops) -> Latents:
        """A record's latents after drops; raises RecordError if it could not be used when they were made."""
        entry = self.entry(subset, index)
        if entry.trouble:
            raise RecordError(entry.trouble)
        files, _ = _open_file(self.folder / file_name(subset, index))

        def read(name: str) -> np.ndarray:
            return files.read(f"{index % RECORDS_IN_FILE}.{name}")

        bad = self._black if drops.image else (read("bad_mean"), read("bad_logvar"))
        text_name = "text" if drops.reflection or not entry.has_reflection else "text_with_reflection"
        text = self._empty_text if drops.text else read(text_name)
        return Latents((read("good_mean"), read("good_logvar")), bad, read("pooled"), text)


@dataclass(frozen=True)
class LatentCollator:
    """Makes the example of a drawn sample from its latents."""

    source: LatentSource
    config: DataConfig
    seed: int

    def __call__(self, draw: SampleRef) -> WorkerResult:
        entry = self.source.entry(draw.subset, draw.index)
        drops = draw_drops(self.config, self.seed, draw.number, draw.subset, entry.reflection)
        try:
            latents = self.source.read(draw.subset, draw.index, drops)
        except RecordError as error:
            return WorkerResult(None, b"", str(error))
        text = t5_text(entry.prompt, entry.reflection, drops)
        example: Any = LatentExample(latents, entry.prompt, text, entry.key, draw.subset)
        # These determine the latents, which are too large to be hashed at each step.
        identity = "\0".join([entry.key, draw.subset, entry.prompt, text, str(drops.image)])
        return WorkerResult(example, hashlib.sha256(identity.encode()).digest())


class LatentLoader(Loader):
    """Batches of a plan, read by a thread since there is nothing to decode."""

    def _batch(self, numbers: np.ndarray, examples: list[Any], common_fields: dict[str, Any], /) -> Any:
        found: list[Latents] = [example.latents for example in examples]
        latents = Latents(
            _stack_pairs([one.good for one in found]),
            _stack_pairs([one.bad for one in found]),
            np.stack([one.pooled for one in found]),
            np.stack([one.text for one in found]),
        )
        return LatentBatch(numbers=numbers, latents=latents, **texts_of(examples), **common_fields)


def open_latents(folder: str | list[str]) -> LatentSource:
    """Opens the output of ``rflow data precompute``; raises InputError if it is missing or incomplete."""
    if not isinstance(folder, str):
        raise InputError("data.path: give one folder with data.format precomputed, not a list")
    return LatentSource(Path(folder).expanduser().absolute())


def open_latent_loader(
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    slots: Sequence[int],
    start: int = 0,
    position: Mapping[str, Any] | None = None,
) -> LatentLoader:
    """The batches from step ``start`` on: the same samples that are drawn from tars.

    Raises:
        InputError: the files are unusable, made with other sizes, or do not fit the position.
    """
    source = open_latents(config.path)
    wanted = {name: getattr(config, name) for name in ("target_size", "condition_size", "crop")}
    require_same(source.folder, source.settings, wanted)
    plan = RecordSampler(source, config, seed=seed, batch_size=batch_size, slots=slots, position=position)
    return LatentLoader(plan, LatentCollator(source, config, seed), replace(config, workers=0), start)


def require_same(folder: Path, kept: LatentMetadata, wanted: Mapping[str, Any]) -> None:
    """Raises InputError, naming the first difference, if latents were made with other settings."""
    for name, value in wanted.items():
        if (made := getattr(kept, name)) != value:
            raise InputError(f"{folder}: made with {name} {made}, not {value}; set it to that, or precompute again")


def file_name(subset: str, index: int) -> str:
    """The file of a record."""
    return f"{subset}-{index // RECORDS_IN_FILE * RECORDS_IN_FILE:08d}.safetensors"


def read_settings(folder: Path) -> LatentMetadata:
    """The settings of a folder; raises InputError if they are unreadable or of another version."""
    content = _read_json(folder / SETTINGS)
    try:
        settings = LatentMetadata(**content)
    except TypeError as error:
        raise InputError(f"{folder / SETTINGS}: not the settings of precomputed latents ({error})") from error
    if settings.format != FORMAT:
        raise InputError(f"{folder}: of format {settings.format}, this version reads {FORMAT}; precompute again")
    return settings


def settings_text(settings: LatentMetadata) -> str:
    """The content of ``settings.json``."""
    return json.dumps(asdict(settings), indent=1)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path}: cannot be read (no such file); rflow data precompute writes it")
    return read_object(path)


@lru_cache(_KEPT_HEADERS)
def _open_file(path: Path) -> tuple[TensorFiles, list[LatentEntry]]:
    files = TensorFiles.open(path)
    try:
        return files, [_entry(*entry) for entry in parse_json(files.metadata["entries"], str(path))]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error!r}); remove it and precompute again") from error


def _entry(*fields: Any) -> LatentEntry:
    """Raises TypeError for fields of other types."""
    entry = LatentEntry(*fields)
    if not all(isinstance(text, str) for text in (entry.key, entry.prompt, entry.reflection, entry.trouble)):
        raise TypeError("a text is none")
    return entry


def _stack_pairs(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.stack(part) for part in zip(*pairs, strict=True))
    return first, second
