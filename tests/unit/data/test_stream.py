"""Shards read as a stream: routed, shuffled, bounded, and resumed sample by sample."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from rflow_jax.data.config import DataConfig
from rflow_jax.data.loader import HostBatch
from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sources.open import open_loader
from rflow_jax.data.sources.stream import Buffers, merge_positions
from rflow_jax.data.sources.stream_shards import ProcessShare, RecordStream, ShardAssignment, StreamPosition, read_shard
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import Shard, expand
from rflow_jax.errors import InputError
from tests.kit.file_server import Faults, FileServer
from tests.kit.genref_tars import flat, keys_of, tar_bytes, write_shards

BATCH = 4
EQUAL = {name: [1.0, 1.0] for name in SUBSETS}
SOON = RetryPolicy(timeout=0.5, max_retries=2, max_backoff=0.01)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("stream")
    write_shards(folder, shards=5, count=12)
    sizes = {"target_size": 16, "condition_size": 8, "shuffle_buffer_size": 6, "prefetch": 2}
    return DataConfig(str(folder), "stream", EQUAL, workers=0, retry=SOON, **sizes)


def batches(config: DataConfig, count: int, slots=range(BATCH), start: int = 0, position=None) -> list[HostBatch]:
    with open_loader(config, seed=1, batch_size=BATCH, slots=slots, start=start, position=position) as loader:
        return list(islice(loader, count))


def prompts(found: list[HostBatch]) -> list[str]:
    return [prompt for batch in found for prompt in batch.prompts]


def test_every_record_comes_round_at_its_own_pace(config):
    found = batches(config, 60)
    assert np.concatenate([batch.numbers for batch in found]).tolist() == list(range(60 * BATCH))
    counts = Counter(prompts(found))
    assert len(counts) == 60  # all of them
    subsets = Counter(subset for batch in found for subset in batch.subsets)
    assert all(35 < subsets[name] < 85 for name in SUBSETS)
    assert prompts(found[:5]) != sorted(prompts(found[:5]))


def test_worker_processes_make_the_same_batches(config):
    ours, theirs = batches(replace(config, workers=1), 4), batches(config, 4)
    assert [batch.digest for batch in ours] == [batch.digest for batch in theirs]


def test_a_shard_is_read_once_in_an_epoch(config):
    with FileServer(Path(str(config.path)), Faults(ranges=False)) as server:
        shards = f"{server.url}/{{000..004}}.tar"
        found = batches(replace(config, path=shards), 8)
        whole = [path for path, wanted in server.requests if not wanted]
    assert prompts(found) == prompts(batches(config, 8))
    assert max(Counter(whole).values()) - min(Counter(whole).values()) <= 1


@pytest.mark.parametrize("step", [1, 7, 20])
def test_a_resumed_run_sees_the_same_samples(config, step):
    whole = batches(config, step + 12)
    with open_loader(config, seed=1, batch_size=BATCH, slots=range(BATCH)) as loader:
        list(islice(loader, step + 1))  # it is read in advance
        position = json.loads(json.dumps(loader.position(step)))
        assert position["drawn"] == loader.drawn(step)
    later = batches(config, 12, start=step, position=position)
    assert [batch.digest for batch in later] == [batch.digest for batch in whole[step:]]


def test_a_position_of_other_shards_or_processes_is_refused(config):
    with open_loader(config, seed=1, batch_size=BATCH, slots=range(BATCH)) as loader:
        position = loader.position(0)
    with pytest.raises(InputError, match="not the records the run began with"):
        batches(replace(config, path=f"{config.path}/000.tar"), 1, position=position)
    with pytest.raises(InputError, match="had 1 processes with other samples"):
        batches(config, 1, slots=range(2), position=position)
    with pytest.raises(InputError, match="without the position"):
        batches(config, 1, start=3)


@pytest.mark.parametrize("shards", [5, 1])
@pytest.mark.parametrize("slots", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 2], [1, 3]]])
def test_processes_share_the_stream(config, shards, slots):
    """Also where there are fewer shards than processes."""
    found = expand(str(config.path))[:shards]
    shares = [ProcessShare.of(own, BATCH) for own in slots]
    parts = shares[0].parts
    routes = [ShardAssignment(found, share, seed=0) for share in shares]

    def keys(route: ShardAssignment, epoch: int) -> list[str]:
        stream, keys = RecordStream(route, SOON, StreamPosition(epoch, 0, 0)), []
        while stream.position.epoch == epoch:
            keys += [one[1].key for one in [stream.read()] if one]
        return keys

    for epoch in range(3):
        every = [key for route in routes for key in keys(route, epoch)]
        assert sorted(every) == sorted(key for shard in range(shards) for key in keys_of(shard, 12))
    # In as many epochs as there are parts, each process sees all.
    assert len({key for epoch in range(parts) for key in keys(routes[0], epoch)}) == 12 * shards


def test_two_processes_resume_from_one_merged_position(config):
    halves = [range(2), range(2, 4)]
    whole = [batches(config, 9, slots) for slots in halves]
    assert not set(prompts(whole[0][:2])) & set(prompts(whole[1][:2]))
    positions = []
    for slots in halves:
        with open_loader(config, seed=1, batch_size=BATCH, slots=slots) as loader:
            list(islice(loader, 5))
            positions.append(loader.position(5))
    merged = json.loads(json.dumps(merge_positions(positions)))
    for slots, expected in zip(halves, whole, strict=True):
        later = batches(config, 4, slots, start=5, position=merged)
        assert [batch.digest for batch in later] == [batch.digest for batch in expected[5:]]


def test_a_scarce_subset_neither_blocks_nor_fills_the_memory(config, tmp_path):
    keys = {f"k{i:03d}": "rule" if i % 40 == 7 else "editing" for i in range(160)}
    (tmp_path / "000.tar").write_bytes(tar_bytes(flat(keys)))
    share = ProcessShare.of(range(1), 1)
    route = ShardAssignment(expand(str(tmp_path)), share, seed=0)
    buffers = Buffers(RecordStream(route, SOON), route, ("rule", "editing"), 6, seed=0)
    drawn = Counter(buffers.draw("rule", number).raw.key for number in range(40))
    assert set(drawn) == {key for key, subset in keys.items() if subset == "rule"}
    assert max(drawn.values()) <= 12
    held = buffers.snapshot()["items"]
    assert len(held["editing"]) == 6
    # What ran over was replaced at random: what is held is not merely what came first or last.
    assert len({place[2] // 40 for place in held["editing"]}) > 1


def test_a_subset_that_no_shard_holds_is_an_error(config, tmp_path):
    write_shards(tmp_path, shards=2, count=8, subsets=("rule", "editing"))
    with pytest.raises(InputError, match=r"split_ratios\.(length|general): positive, but there are no records"):
        batches(replace(config, path=str(tmp_path)), 4)
    assert batches(replace(config, path=str(tmp_path), split_ratios={"rule": [1.0, 0.0], "editing": [0.0, 1.0]}), 4)


@pytest.fixture
def damaged(config, tmp_path) -> DataConfig:
    """A shard that is cut, one that is none, and samples that cannot be used."""
    write_shards(tmp_path, shards=1, count=16)
    cut = tar_bytes(flat(keys_of(1, 16)))
    (tmp_path / "001.tar").write_bytes(cut[: len(cut) // 2])
    (tmp_path / "002.tar").write_bytes(b"no tar" * 1000)
    files = [
        (name, b"no picture" if name.startswith(("003_0001.good", "003_0005.bad")) else content)
        for name, content in flat(keys_of(3, 16))
        if name != "003_0002.prompt.txt"
    ]
    (tmp_path / "003.tar").write_bytes(tar_bytes(files))
    return replace(config, path=str(tmp_path))


def test_damage_is_skipped_named_and_counted(damaged, caplog):
    found = batches(damaged, 30)
    skipped = [reason for batch in found for reason in batch.skipped]
    for words in ("003_0002 has no prompt.txt", "002.tar: not a tar", "8 samples before it", "cannot be decoded"):
        assert any(words in reason for reason in skipped), words
    assert sum("has no prompt.txt" in reason for reason in skipped) == 1
    assert not caplog.messages  # who takes the batches tells them, once
    assert all(len(batch.prompts) == BATCH for batch in found)
    with pytest.raises(InputError, match=r"more than data.skip_limit \(1\)"):
        batches(replace(damaged, skip_limit=1), 30)


def test_replacements_do_not_disturb_what_comes_later(damaged):
    whole = batches(damaged, 16)
    assert any("cannot be decoded" in reason for batch in whole for reason in batch.skipped)
    with open_loader(damaged, seed=1, batch_size=BATCH, slots=range(BATCH)) as loader:
        list(islice(loader, 6))
        position = loader.position(6)
    later = batches(damaged, 10, start=6, position=position)
    assert [batch.digest for batch in later] == [batch.digest for batch in whole[6:]]


@pytest.mark.parametrize("faults", [{"cut": 2}, {"status": 2}, {"dead": 2}, {"stall": 1, "seconds": 2.0}])
def test_a_server_that_fails_is_asked_again(config, faults, monkeypatch):
    monkeypatch.setattr("rflow_jax.data.storage.retry.SLOWEST", 1 << 30)
    with FileServer(Path(str(config.path))) as server:
        (shard,) = expand(f"{server.url}/000.tar")
        server.faults = Faults(**faults)
        found = list(read_shard(shard, SOON))
    assert [raw.key for raw in found] == list(keys_of(0, 12))
    assert not any(raw.trouble for raw in found)


def test_a_dead_address_is_skipped_and_told(config, tmp_path):
    write_shards(tmp_path, shards=3, count=8)
    with FileServer(tmp_path) as server:
        shards = replace(config, path=f"{server.url}/{{000..002}}.tar")
        with open_loader(shards, seed=1, batch_size=BATCH, slots=range(BATCH)) as loader:
            (tmp_path / "001.tar").unlink()
            found = list(islice(loader, 20))
    assert any("001.tar: status 404" in reason for batch in found for reason in batch.skipped)
    assert len(set(prompts(found))) >= 16


def test_a_pipe_is_read_when_a_flag_allows_it(config, tmp_path):
    pipe = f"pipe:cat {config.path}/{{000..004}}.tar"
    with pytest.raises(InputError, match="allow_shell"):
        batches(replace(config, path=pipe), 1)
    found = batches(replace(config, path=pipe, allow_shell=True), 6)
    assert prompts(found) == prompts(batches(config, 6))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sleep 60", "no byte for 0.5 s"),
        ("head -c 9000 {}; exit 3", "the command ended with status 3"),
        ("exit 3", "status 3"),
    ],
)
def test_a_pipe_that_hangs_or_fails_is_ended(config, command, words):
    shard = Shard("pipe:" + command.format(Path(str(config.path)) / "000.tar"), None, "")
    *before, last = read_shard(shard, SOON)
    assert words in last.trouble
    assert [raw.key for raw in before] == list(keys_of(0, len(before)))


def test_compressed_shards_are_read(config, tmp_path):
    import gzip

    (tmp_path / "000.tar").write_bytes(gzip.compress((Path(str(config.path)) / "000.tar").read_bytes()))
    (shard,) = expand(str(tmp_path))
    assert [raw.key for raw in read_shard(shard, SOON)] == list(keys_of(0, 12))
    cut = (tmp_path / "000.tar").read_bytes()
    (tmp_path / "000.tar").write_bytes(cut[: len(cut) // 2])
    assert "samples before it" in list(read_shard(shard, SOON))[-1].trouble


def test_nothing_is_left_running():
    assert not multiprocessing.active_children()
