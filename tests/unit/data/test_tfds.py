"""GenRef as a data set of TFDS: the same records in the same order, without TensorFlow."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from rflow_jax.commands import dataset
from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import SUBSETS, RecordError
from rflow_jax.data.sources.open import open_loader
from rflow_jax.data.sources.tar import TarSource, open_tars
from rflow_jax.data.sources.tfds import open_tfds
from rflow_jax.errors import InputError
from rflow_jax.utils import cli
from tests.kit.genref_tars import flat, keys_of, tar_bytes, write_shards

pytest.importorskip("tensorflow_datasets")
from rflow_jax.precompute.tfds_builder import write_tfds


class Made:
    """Shards, and the data set made of them."""

    def __init__(self, root: Path):
        self.root, self.tars = root, root / "shards"
        write_shards(self.tars, shards=2, count=12)
        # Two records that cannot be used: one is known when it is read, the other when it is decoded.
        wrong = {"009_0001.prompt.txt": b"\xff", "009_0002.good_image.jpg": b"no picture"}
        files = [(name, wrong.get(name, content)) for name, content in flat(keys_of(9, 8, ("rule", "editing")))]
        (self.tars / "009.tar").write_bytes(tar_bytes(files))
        self.source: TarSource = open_tars(str(self.tars), cache=root / "index", show=False)
        self.folder = write_tfds(self.source, root / "out", show=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("tfds"))


def everything(source) -> list:
    def read(name, index):
        try:
            return source.read(name, index)
        except RecordError as error:
            return str(error)

    return [read(name, index) for name in SUBSETS for index in range(source.counts[name])]


@pytest.mark.parametrize("place", ["out", "out/genref/1.0.0"])
def test_records_and_order_are_those_of_the_shards(made, place):
    ours = open_tfds(str(made.root / place))
    assert dict(ours.counts) == dict(made.source.counts)
    assert ours.fingerprint == made.source.fingerprint
    assert everything(ours) == everything(made.source)
    assert sum(isinstance(one, str) for one in everything(ours)) == 1


def test_a_copy_in_another_process_reads_the_same(made):
    ours = open_tfds(str(made.root / "out"))
    first = ours.read("rule", 0)
    assert pickle.loads(pickle.dumps(ours)).read("rule", 0) == first
    with pytest.raises(IndexError):
        ours.read("rule", made.source.counts["rule"])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_shards(made, workers):
    tars = DataConfig(str(made.tars), target_size=16, condition_size=8, workers=workers, cache=str(made.root / "index"))
    arrays = replace(tars, path=str(made.root / "out"), format="tfds")

    def batches(config):
        with open_loader(config, seed=3, batch_size=8, slots=range(8)) as loader:
            return [*islice(loader, 8)], loader.position(8)

    (theirs, there), (ours, here) = batches(tars), batches(arrays)
    assert here == there
    assert any(batch.skipped for batch in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a._replace(waited=0), b._replace(waited=0), strict=True))


def test_the_order_holds_over_several_files(made, monkeypatch, tmp_path):
    monkeypatch.setattr("rflow_jax.precompute.tfds_builder.RECORDS_IN_FILE", 3)
    folder = write_tfds(made.source, tmp_path, show=False)
    assert (folder / "genref-rule.array_record-00003-of-00004").exists()
    assert everything(open_tfds(str(tmp_path))) == everything(made.source)


def test_others_read_it_with_tfds_alone(made):
    import tensorflow_datasets as tfds

    one = tfds.builder_from_directory(str(made.folder)).as_data_source(split="general")[0]
    assert one["good_image"].shape == (8, 8, 3)
    assert one["prompt"].decode() == made.source.read("general", 0).prompt


def test_a_conversion_that_breaks_off_leaves_no_data_set(made, monkeypatch, tmp_path):
    read = TarSource.read

    def fails(self, subset, index):
        if (subset, index) == ("rule", 2):
            raise InputError("000.tar: is gone")
        return read(self, subset, index)

    monkeypatch.setattr(TarSource, "read", fails)
    with pytest.raises(InputError, match=r"000\.tar: is gone"):
        write_tfds(made.source, tmp_path, show=False)
    with pytest.raises(InputError, match="no data set of TFDS here"):
        open_tfds(str(tmp_path))


def test_a_folder_is_not_written_over(made):
    with pytest.raises(InputError, match="contains a data set already"):
        write_tfds(made.source, made.root / "out", show=False)


def test_a_damaged_description_is_one_line(made, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="no usable data set"):
        open_tfds(str(tmp_path))


def test_tensorflow_is_not_imported_and_the_command_says_what_it_wrote(made, tmp_path):
    script = (
        "import sys; from rflow_jax.commands.main import main; main(); "
        "assert not {'tensorflow', 'jax'} & set(sys.modules)"
    )
    places = [str(made.tars / "000.tar"), str(made.tars / "001.tar"), str(tmp_path / "out")]
    command = [sys.executable, "-c", script, "data", "tfds", *places, "--cache", str(tmp_path / "index")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "24 records (general 6, length 6, rule 6, editing 6)" in done.stdout


def test_a_missing_package_is_one_line(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(InputError, match=r"pip install rflow_jax\[tfds\]"):
        open_tfds(str(made.root / "out"))


def test_bare_words_are_the_shards_and_the_folder():
    seen = []
    command = replace(dataset.command("data tfds", ()), run=seen.append)
    cli.run_command(command, ["a", "b"])
    cli.run_command(command, ["--cache", "c", "a", "b", "d"])
    assert seen == [dataset.TfdsConfig("a", "b"), dataset.TfdsConfig(["a", "b"], "d", "c")]
