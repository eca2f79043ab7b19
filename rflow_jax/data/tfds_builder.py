"""GenRef as a data set of TensorFlow Datasets: ArrayRecord files with random access, made without TensorFlow."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rflow_jax.data.records import SUBSETS, Record, RecordError, RecordSource
from rflow_jax.errors import InputError
from rflow_jax.progress import count_progress

NAME, VERSION = "genref", "1.0.0"
_KEY_BITS = 128


class GenRef(tfds.core.GeneratorBasedBuilder):
    """Pairs of a bad and a good picture of one prompt; a split is a subset, in the order of its source.

    A record that cannot be read is kept with its ``trouble`` and without the rest, so that every other one has the
    number it has in the source.

    Args:
        source: what is written; not needed to read.
        progress: called after each record.
    """

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, source: RecordSource | None = None, progress: Any = None, **how: Any):
        self._source, self._progress = source, progress
        super().__init__(**how)

    def _info(self) -> Any:
        texts = {name: tfds.features.Text() for name in ("key", "prompt", "reflection", "trouble")}
        images = {name: tfds.features.Image(shape=(None, None, 3)) for name in ("good_image", "bad_image")}
        fingerprint = {} if self._source is None else {"fingerprint": self._source.fingerprint}
        return tfds.core.DatasetInfo(
            builder=self,
            description="GenRef: for each prompt a bad picture, a good one, and what to change (reflection).",
            homepage="https://huggingface.co/datasets/diffusion-cot/GenRef-wds",
            features=tfds.features.FeaturesDict(texts | images),
            metadata=tfds.core.MetadataDict(fingerprint),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        assert self._source is not None
        # TFDS has no empty splits.
        return {name: self._generate_examples(name) for name in SUBSETS if self._source.counts.get(name, 0)}

    def _generate_examples(self, subset: str) -> Iterator[tuple[int, dict[str, Any]]]:
        source = self._source
        assert source is not None
        count = source.counts[subset]
        for index in range(count):
            # TFDS writes in the order of the keys, by way of files which each hold a range of the 128-bit numbers:
            # keys that fill the whole range spread over the files, of which one at a time is in memory.
            yield (index << _KEY_BITS) // count, _example(source, subset, index)
            if self._progress is not None:
                self._progress()


def _example(source: RecordSource, subset: str, index: int) -> dict[str, Any]:
    trouble = ""
    try:
        record = source.read(subset, index)
    except RecordError as error:
        record, trouble = Record("", subset, "", "", b"", b""), str(error)
    return {name: value for name, value in record._asdict().items() if name != "subset"} | {"trouble": trouble}


def write_tfds(source: RecordSource, out: Path, *, show: bool = True) -> Path:
    """Writes all records to ``out/genref/1.0.0``; that folder is there whole or not at all.

    Needs room for the largest subset once more while it is written.

    Args:
        show: draw a progress bar.

    Returns:
        The folder.

    Raises:
        InputError: there is such a data set already, or a shard cannot be read.
    """
    folder = out / NAME / VERSION
    if folder.exists():
        raise InputError(f"{folder}: holds a data set already; remove it or name another folder")
    tfds.disable_progress_bar()
    with count_progress(show) as bar:
        task = bar.add_task("Writing records", total=sum(source.counts.values()))
        builder = GenRef(
            source=source, progress=lambda: bar.advance(task), data_dir=str(out), file_format="array_record"
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download
            builder.download_and_prepare(download_dir=str(out / NAME / "downloads"))
    return folder
