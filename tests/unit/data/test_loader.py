"""Batches: in order, the same whatever the processes, and sturdy."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from rflow_jax.data.config import DataConfig
from rflow_jax.data.loader import HostBatch
from rflow_jax.data.sources.open import open_loader
from rflow_jax.data.sources.tar import open_tars
from rflow_jax.errors import InputError, RunError
from rflow_jax.testing import make_genref as maker
from rflow_jax.testing.make_genref import make_genref
from rflow_jax.training.config import ValidationConfig
from rflow_jax.training.corrector.validation import read_held_out
from tests.kit.genref_tars import flat, keys_of, tar_bytes, write_shards

BATCH = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    root = tmp_path_factory.mktemp("loader")
    write_shards(root / "shards", shards=3, count=12)
    return DataConfig(str(root / "shards"), target_size=16, condition_size=8, cache=str(root / "index"), workers=0)


def batches(config: DataConfig, count: int, slots=range(BATCH), start: int = 0, position=None) -> list[HostBatch]:
    with open_loader(config, seed=1, batch_size=BATCH, slots=slots, start=start, position=position) as loader:
        return list(islice(loader, count))


def same(a: HostBatch, b: HostBatch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a._replace(waited=0), b._replace(waited=0), strict=True))


def test_batches_are_whole_and_in_order(config):
    found = batches(config, 5)
    assert [batch.step for batch in found] == list(range(5))
    assert np.concatenate([batch.numbers for batch in found]).tolist() == list(range(5 * BATCH))
    assert found[0].good.shape == (BATCH, 16, 16, 3)
    assert found[0].bad.shape == (BATCH, 8, 8, 3)
    assert len({batch.digest for batch in found}) == 5


def test_worker_processes_make_the_same_batches(config):
    ours = batches(replace(config, workers=2, prefetch=2), 4)
    assert all(same(a, b) for a, b in zip(ours, batches(config, 4), strict=True))


def test_two_processes_see_what_one_sees(config):
    whole = batches(config, 3)
    parts = [batches(config, 3, slots) for slots in (range(4), range(4, 8))]
    for step in range(3):
        np.testing.assert_array_equal(whole[step].good, np.concatenate([part[step].good for part in parts]))
        assert whole[step].t5_texts == parts[0][step].t5_texts + parts[1][step].t5_texts


def test_a_resumed_loader_goes_on_where_it_stood(config):
    whole = batches(config, 6)
    with open_loader(config, seed=1, batch_size=BATCH, slots=range(BATCH)) as loader:
        list(islice(loader, 2))
        position = json.loads(json.dumps(loader.position(4)))
    assert all(same(a, b) for a, b in zip(batches(config, 2, start=4, position=position), whole[4:], strict=True))
    assert sum(position["drawn"].values()) == 4 * BATCH
    with pytest.raises(InputError, match="not the records the run began with"):
        batches(replace(config, path=f"{config.path}/000.tar"), 1, start=4, position=position)


def test_the_subsets_drawn_are_counted(config):
    found = batches(config, 4)
    with open_loader(config, seed=1, batch_size=BATCH, slots=range(BATCH)) as loader:
        for step in range(5):
            subsets = [subset for batch in found[:step] for subset in batch.subsets]
            assert loader.drawn(step) == {name: subsets.count(name) for name in loader.drawn(step)}


@pytest.fixture
def damaged(tmp_path, config) -> DataConfig:
    """Every third record has a picture that is none."""
    files = [
        (name, b"no picture" if "good" in name and int(name[4:8]) % 3 == 0 else content)
        for name, content in flat(keys_of(0, 24))
    ]
    (tmp_path / "000.tar").write_bytes(tar_bytes(files))
    return replace(config, path=str(tmp_path / "000.tar"), split_ratios={"rule": [1.0, 1.0], "editing": [1.0, 1.0]})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_record_is_replaced_and_counted(damaged, workers):
    found = batches(replace(damaged, workers=workers), 4)
    skipped = [reason for batch in found for reason in batch.skipped]
    assert skipped
    assert all("good_image cannot be decoded" in reason for reason in skipped)
    assert all(len(batch.prompts) == BATCH for batch in found)
    # The same ones again, in parts as well.
    parts = [batches(damaged, 4, slots) for slots in (range(4), range(4, 8))]
    assert skipped == [r for step in range(4) for part in parts for r in part[step].skipped]


def test_held_out_records_that_cannot_be_used_are_told(damaged, caplog):
    found = read_held_out(ValidationConfig(damaged.path, records=3), damaged)
    assert [record.subset for record, _ in found].count("rule") == 3
    told = [line for line in caplog.messages if line.startswith("validation: skipped ")]
    assert told
    assert all("good_image cannot be decoded" in line for line in told)


def test_too_many_corrupt_records_end_the_run(damaged):
    with pytest.raises(InputError, match=r"2 records cannot be used, more than data.skip_limit \(1\)"):
        batches(replace(damaged, skip_limit=1), 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_is_named(config, tmp_path, workers):
    write_shards(tmp_path, shards=1, count=12)
    gone = replace(config, path=str(tmp_path), workers=workers, prefetch=1)
    with open_loader(gone, seed=1, batch_size=BATCH, slots=range(BATCH)) as loader:
        found = iter(loader)
        next(found)
        (tmp_path / "000.tar").unlink()
        with pytest.raises(InputError, match=r"000\.tar"):
            list(islice(found, 5))


def test_a_dead_worker_is_an_error_and_not_a_hang(config):
    with open_loader(replace(config, workers=1), seed=1, batch_size=BATCH, slots=range(BATCH)) as loader:
        found = iter(loader)
        next(found)
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(RunError, match="a worker process died"):
            list(islice(found, 50))


KILLED = """
import multiprocessing
import sys
from rflow_jax.data.config import DataConfig
from rflow_jax.data.sources.open import open_loader
if __name__ == "__main__":
    config = DataConfig(sys.argv[1], target_size=16, condition_size=8, cache=sys.argv[2], workers=2)
    loader = open_loader(config, seed=0, batch_size=4, slots=range(4))
    batches = iter(loader)
    next(batches)
    assert "jax" not in sys.modules
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_their_killed_parent(config, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(config.path), str(config.cache)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    until = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)


WITH_JAX = """
import jax
from rflow_jax.data.workers import Workers
from tests.kit.loaded import is_loaded
if __name__ == "__main__":
    with Workers(is_loaded, 1) as workers:
        asked = [workers.submit(name) for name in ("jax", "rflow_jax.data.workers")]
        print(*(one.result() for one in asked))
"""


def test_workers_do_not_import_what_the_main_file_does(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(WITH_JAX)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "True"], done.stderr


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_made_shards_are_valid_and_the_same_each_time(tmp_path):
    paths = make_genref(tmp_path / "a", shards=2, samples=8, size=32)
    again = make_genref(tmp_path / "b", shards=2, samples=8, size=32)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    source = open_tars(str(tmp_path / "a"), cache=tmp_path / "index", show=False)
    assert dict(source.counts) == dict.fromkeys(source.counts, 4)
    one = source.read("rule", 0)
    assert one.prompt.split()[1] in one.reflection
    assert one.good_image != one.bad_image
    natural = make_genref(tmp_path / "c", shards=1, samples=400, size=8, frequencies="natural")
    counts = open_tars(str(natural[0]), cache=tmp_path / "index", show=False).counts
    shares = [counts[name] / 400 for name in ("general", "length", "rule", "editing")]
    np.testing.assert_allclose(shares, maker.FREQUENCIES["natural"], atol=0.07)
