"""Writes GenRef as a TensorFlow Datasets data set: ArrayRecord files, made without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from rflow_jax.data.records import SUBSETS, Record, RecordError, RecordSource
from rflow_jax.errors import InputError
from rflow_jax.utils.progress import count_progress

NAME, VERSION = "genref", "1.0.0"
RECORDS_IN_FILE = 512  # about 0.8 GB of GenRef


class GenRef(tfds.core.GeneratorBasedBuilder):
    """Pairs of a bad and a good image of one prompt; a split is a subset, in the order of its source.

    A record that cannot be read is kept with its ``trouble`` alone, so that all others keep their source's numbers.

    Args:
        source: the records to write; not needed for reading.
        progress: called after each record.
    """

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, source: RecordSource | None = None, progress: Any = None, **options: Any):
        self._source, self._progress = source, progress
        super().__init__(**options)

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
        assert self._source is not None
        for index in range(self._source.counts[subset]):
            trouble = ""
            try:
                record = self._source.read(subset, index)
            except RecordError as error:
                record, trouble = Record("", subset, "", "", b"", b""), str(error)
            fields = {name: value for name, value in record._asdict().items() if name != "subset"}
            yield index, fields | {"trouble": trouble}
            if self._progress is not None:
                self._progress()

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[Any]:
        """Writes records as they come.

        TFDS itself sorts them through temporary files, which needs TensorFlow once a split exceeds 1 GB.
        """
        return [self._write_split(name, found) for name, found in self._split_generators(dl_manager).items()]

    def _write_split(self, name: str, found: Iterator[tuple[int, dict[str, Any]]]) -> Any:
        features: Any = self.info.features
        assert self._source is not None
        count = self._source.counts[name]
        lengths = [min(RECORDS_IN_FILE, count - start) for start in range(0, count, RECORDS_IN_FILE)]
        template, written = self._get_filename_template(split_name=name), 0
        for number, length in enumerate(lengths):
            path = template.sharded_filepath(shard_index=number, num_shards=len(lengths))
            writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")  # images are compressed already
            for _, example in islice(found, length):
                content = features.serialize_example(example)
                writer.write(content)
                written += len(content)
            writer.close()
        return tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=written, filename_template=template)


def write_tfds(source: RecordSource, out: Path, *, show: bool = True) -> Path:
    """Writes all records to ``out/genref/1.0.0``, atomically, and returns that folder.

    Args:
        show: draw a progress bar.

    Raises:
        InputError: there is such a data set already, or a shard cannot be read.
    """
    folder = out / NAME / VERSION
    if folder.exists():
        raise InputError(f"{folder}: contains a data set already; remove it or name another folder")
    tfds.disable_progress_bar()
    with count_progress(show) as bar:
        task = bar.add_task("Writing records", total=sum(source.counts.values()))
        builder = GenRef(
            source=source, progress=lambda: bar.advance(task), data_dir=str(out), file_format="array_record"
        )
        # It announces a download, and makes a folder for it.
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as empty:
            builder.download_and_prepare(download_dir=empty)
    return folder
