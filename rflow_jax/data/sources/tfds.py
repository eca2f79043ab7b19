"""GenRef from ArrayRecord files, as TensorFlow Datasets writes them; needs no TensorFlow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rflow_jax.data.records import SUBSETS, Record, RecordError
from rflow_jax.errors import InputError

_INFO = "dataset_info.json"


class TfdsSource:
    """The records of a data set, in the order of the source it was made from; a ``RecordSource``.

    Args:
        folder: the one that holds ``dataset_info.json``.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._splits: dict[str, Any] = {}
        builder = _builder(folder)
        infos = {name: builder.info.splits[name] for name in SUBSETS if name in builder.info.splits}
        self._counts = {name: infos[name].num_examples if name in infos else 0 for name in SUBSETS}
        sizes = [[name, info.num_bytes, info.shard_lengths] for name, info in infos.items()]
        kept = dict(builder.info.metadata or {}).get("fingerprint")
        self._fingerprint = kept or hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:32]

    @property
    def counts(self) -> Mapping[str, int]:
        """Records of each subset."""
        return self._counts

    @property
    def fingerprint(self) -> str:
        """That of the source it was made from: a run may continue with either."""
        return self._fingerprint

    def read(self, subset: str, index: int) -> Record:
        """Reads one record.

        Raises:
            RecordError: it could not be read when the data set was made.
            InputError: its file is missing or damaged.
        """
        if not 0 <= index < self._counts[subset]:
            raise IndexError(f"{subset} {index}: there are {self._counts[subset]} records")
        if subset not in self._splits:
            skip = import_tfds().decode.SkipDecoding()
            decoders = {"good_image": skip, "bad_image": skip}
            self._splits[subset] = _builder(self._folder).as_data_source(split=subset, decoders=decoders)
        try:
            found = self._splits[subset][index]
        except Exception as error:  # array_record raises many kinds
            raise InputError(f"{self._folder}: {subset} {index} cannot be read ({_line(error)})") from error
        if found["trouble"]:
            raise RecordError(found["trouble"].decode())
        key, prompt, reflection = (found[name].decode() for name in ("key", "prompt", "reflection"))
        return Record(key, subset, prompt, reflection, found["good_image"], found["bad_image"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_splits": {}}  # open files are not pickled


def open_tfds(folder: str | list[str]) -> TfdsSource:
    """Opens a data set.

    Args:
        folder: what ``rflow data tfds`` was given, or the folder with ``dataset_info.json``.

    Raises:
        InputError: there is no data set of GenRef, or a package is not installed.
    """
    if not isinstance(folder, str):
        raise InputError("data.path: give one folder with data.format tfds, not a list")
    root = Path(folder).expanduser()
    found = [root, *sorted((root / "genref").glob("*"))]
    home = next((path for path in found if (path / _INFO).is_file() and "incomplete" not in path.name), None)
    if home is None:
        raise InputError(f"{root}: no data set of TFDS here; rflow data tfds makes one")
    source = TfdsSource(home.absolute())
    if not any(source.counts.values()):
        raise InputError(f"{home}: no split of it is a subset of GenRef ({', '.join(SUBSETS)})")
    return source


def import_tfds() -> Any:
    """The package tensorflow_datasets; raises InputError if it or array_record is not installed."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise InputError(
            f"TFDS needs a package that is not installed ({error}): pip install rflow_jax[tfds]"
        ) from error
    return tensorflow_datasets


def _builder(folder: Path) -> Any:
    tfds = import_tfds()
    try:
        return tfds.builder_from_directory(str(folder))
    except Exception as error:  # a damaged description raises many kinds
        raise InputError(f"{folder}: no usable data set of TFDS ({_line(error)})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
