"""The index of shards, and records read by it."""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.data.records import SUBSETS, RecordError
from rflow_jax.data.sources.tar import TarSource, open_tars
from rflow_jax.data.sources.tar_index import build_index, index_shards
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import RangeFile, expand
from rflow_jax.errors import InputError
from rflow_jax.utils.cache import cache_folder
from tests.kit.file_server import Faults, FileServer
from tests.kit.genref_tars import flat, keys_of, members, picture, record, shard_bytes, tar_bytes, write_shards

QUICK = RetryPolicy(timeout=0.5, max_retries=3, max_backoff=0.02)


def opened(folder, pattern="*.tar") -> TarSource:
    return open_tars(str(folder / pattern), cache=folder / "cache", show=False)


def everything(source):
    return [source.read(subset, i) for subset in SUBSETS for i in range(source.counts[subset])]


def expected(*shards):
    pairs = [pair for keys in shards for pair in keys.items()]
    return [record(key, subset) for wanted in SUBSETS for key, subset in pairs if subset == wanted]


def test_every_record_is_read_in_the_order_of_the_shards(tmp_path):
    write_shards(tmp_path, 3, 10)
    source = opened(tmp_path)
    assert source.counts == {"general": 9, "length": 9, "rule": 6, "editing": 6}
    assert everything(source) == expected(*(keys_of(shard, 10) for shard in range(3)))
    assert source.unusable == 0
    with pytest.raises(IndexError, match="rule 6"):
        source.read("rule", 6)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path, format):
    folder = "./some folder/" + ("é" if format != tarfile.USTAR_FORMAT else "e") * 60 + "/"
    keys = {folder + ("x" * (150 if format != tarfile.USTAR_FORMAT else 60)) + str(i): "rule" for i in range(3)}
    (tmp_path / "a.tar").write_bytes(shard_bytes(keys, format))
    assert everything(opened(tmp_path)) == expected(keys)


def test_pictures_of_other_formats_and_foreign_members(tmp_path):
    files = {"good_image.PNG": picture("a", "PNG"), "meta.json": b"{}", "bad_image.webp": picture("b", "WEBP")}
    files |= {"reflection.txt": b"", "prompt.txt": b"p", "subset.txt": b"rule\n"}
    named = [("LICENSE", b"free"), ("__meta__/x.json", b"{}"), *((f"k.{name}", c) for name, c in files.items())]
    (tmp_path / "a.tar").write_bytes(tar_bytes(named))
    (one,) = everything(opened(tmp_path))
    assert one == ("k", "rule", "p", "", picture("a", "PNG"), picture("b", "WEBP"))


def test_members_that_lie_apart_are_read_apart(tmp_path, monkeypatch):
    sample = members("k", "rule")
    named = [(f"k.{name}", content) for name, content in sample.items()]
    named.insert(2, ("k.depth.npy", bytes(1 << 20)))
    (tmp_path / "a.tar").write_bytes(tar_bytes(named))
    lengths = []
    from rflow_jax.data.sources import tar as tar_source

    read = tar_source.read_range
    monkeypatch.setattr(tar_source, "read_range", lambda *args: lengths.append(args[2]) or read(*args))
    assert everything(opened(tmp_path)) == [record("k", "rule")]
    assert len(lengths) == 2
    assert sum(lengths) < 10000


def apart(keys, order):
    """The files of samples, member by member: the members of one sample lie among those of the others."""
    files = {key: members(key, subset) for key, subset in keys.items()}
    return [(f"{key}.{name}", files[key][name]) for name in order for key in keys]


@pytest.mark.parametrize("order", [sorted(members("k", "rule")), sorted(members("k", "rule"), reverse=True)])
def test_members_among_those_of_other_samples_are_found(tmp_path, caplog, order):
    keys = keys_of(0, 8)
    (tmp_path / "a.tar").write_bytes(tar_bytes([*apart(keys, order), *flat(keys_of(1, 4))]))
    source = opened(tmp_path)
    assert everything(source) == expected(keys, keys_of(1, 4))
    assert source.unusable == 0
    assert caplog.text == ""


def test_what_lies_apart_is_not_mixed_with_whole_samples(tmp_path, caplog):
    """A key may stand for several whole samples, one after another; what lacks members is named once."""
    twice, halves = flat({"a": "rule"}), flat({"b": "rule"})
    between = flat({"c": "general"})
    lone = [("a.prompt.txt", b"whose?"), ("b.prompt.txt", b"again"), ("d.subset.txt", b"rule")]
    named = [*twice, *halves[:2], *between, *twice, *halves[2:], *lone[:1], *between, *lone[1:]]
    (tmp_path / "a.tar").write_bytes(tar_bytes(named))
    source = opened(tmp_path)
    assert sorted(one.key for one in everything(source)) == ["a", "a", "b", "c", "c"]
    assert source.unusable == 3
    for words in ("a has no good_image", "b has no good_image", "d has no good_image"):
        assert words in caplog.text


def test_an_index_of_the_first_format_serves_if_nothing_is_missing(tmp_path, monkeypatch):
    from rflow_jax.data.sources import index_cache, tar_index, tar_members

    (tmp_path / "a.tar").write_bytes(tar_bytes(apart(keys_of(0, 4), sorted(members("k", "rule")))))
    write_shards(tmp_path, 1, 4)
    monkeypatch.setattr(index_cache, "_FORMATS", (1,))
    monkeypatch.setattr(tar_index, "gathered", lambda found: (list(tar_members.samples(found)), None))
    assert opened(tmp_path).unusable == 20
    monkeypatch.undo()
    built = []
    build = tar_index.build_index
    monkeypatch.setattr(tar_index, "build_index", lambda shard, *rest: built.append(shard.name) or build(shard, *rest))
    assert opened(tmp_path).unusable == 0
    assert built == ["a.tar"]


def test_unusable_samples_are_counted_and_named(tmp_path, caplog):
    named = flat(keys_of(0, 6))
    named = [pair for pair in named if pair[0] != "000_0001.bad_image.jpg"]
    named = [(n, b"landscape" if n == "000_0002.subset.txt" else c) for n, c in named]
    named.insert(0, ("000_0000.good_image.png", b"again"))
    (tmp_path / "a.tar").write_bytes(tar_bytes(named))
    source = opened(tmp_path)
    assert source.unusable == 3
    assert sum(source.counts.values()) == 3
    assert "3 of 6 samples cannot be used" in caplog.text
    for words in ("000_0000 has two of good_image", "000_0001 has no bad_image", "000_0002 has an unknown subset"):
        assert words in caplog.text


def test_no_usable_sample_is_an_error(tmp_path):
    named = [pair for pair in flat(keys_of(0, 2)) if "prompt" not in pair[0] and "good" not in pair[0]]
    (tmp_path / "a.tar").write_bytes(tar_bytes(named))
    with pytest.raises(InputError, match=r"a\.tar: 000_0000 has no good_image and no prompt\.txt"):
        opened(tmp_path)
    (tmp_path / "a.tar").write_bytes(tar_bytes([("LICENSE", b"x")]))
    with pytest.raises(InputError, match="no sample"):
        opened(tmp_path)


@given(cut=st.integers(600, 20000))
def test_what_lies_before_a_cut_counts(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    whole = shard_bytes(keys_of(0, 4))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [m.offset_data + m.size for m in tar if m.name.endswith("subset.txt")]
    cut = min(cut, ends[-1] + 511)
    (folder / "a.tar").write_bytes(whole[:cut])
    (shard,) = expand(str(folder / "a.tar"))
    index = build_index(shard)
    assert len(index) == sum(end <= cut for end in ends)
    assert index.troubles.damage
    assert index.troubles.samples == 0


def test_damage_in_the_middle_is_said(tmp_path, caplog):
    whole = bytearray(shard_bytes(keys_of(0, 8)))
    middle = len(whole) // 2 // 512 * 512
    whole[middle : middle + 2048] = b"\x55" * 2048
    (tmp_path / "a.tar").write_bytes(whole)
    source = opened(tmp_path)
    assert 0 < sum(source.counts.values()) < 8
    assert "a.tar: " in caplog.text
    assert "byte" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100, gzip.compress(shard_bytes(keys_of(0, 2)))])
def test_a_file_that_is_no_tar_is_an_error(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tar: not a tar file"):
        opened(tmp_path)


def test_a_corrupt_text_or_an_empty_picture_is_a_record_error(tmp_path):
    named = [(n, b"\xff\xfe\xff" if n == "000_0000.prompt.txt" else c) for n, c in flat(keys_of(0, 2))]
    named = [(n, b"" if n == "000_0001.good_image.jpg" else c) for n, c in named]
    (tmp_path / "a.tar").write_bytes(tar_bytes(named))
    source = opened(tmp_path)
    with pytest.raises(RecordError, match="000_0000: a text is not UTF-8"):
        source.read("general", 0)
    with pytest.raises(RecordError, match="000_0001: good_image is empty"):
        source.read("length", 0)


def test_the_cache_serves_and_is_rebuilt(tmp_path, monkeypatch, caplog):
    write_shards(tmp_path, 2, 8)
    first = everything(opened(tmp_path))
    from rflow_jax.data.sources import tar_index

    built = []
    build = tar_index.build_index
    monkeypatch.setattr(tar_index, "build_index", lambda shard, *rest: built.append(shard.name) or build(shard, *rest))
    assert everything(opened(tmp_path)) == first
    assert built == []
    damaged, untouched = sorted((tmp_path / "cache").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert everything(opened(tmp_path)) == first
    assert len(built) == 1
    assert "damaged" in caplog.text
    untouched.write_bytes(b"")
    assert everything(opened(tmp_path)) == first
    assert len(built) == 2
    (tmp_path / "001.tar").write_bytes(shard_bytes(keys_of(7, 8)))
    assert everything(opened(tmp_path)) == expected(keys_of(0, 8), keys_of(7, 8))
    assert built[2:] == ["001.tar"]
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_every_flipped_byte_of_a_cache_file_is_noticed_or_harmless(tmp_path):
    write_shards(tmp_path, 1, 4)
    first = everything(opened(tmp_path))
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(content), 60):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        assert everything(opened(tmp_path)) == first


def test_an_unwritable_cache_costs_a_warning(tmp_path, caplog):
    write_shards(tmp_path, 1, 4)
    (tmp_path / "file").write_text("in the way")
    source = open_tars(str(tmp_path / "000.tar"), cache=tmp_path / "file" / "cache", show=False)
    assert len(everything(source)) == 4
    assert "not kept" in caplog.text


def test_the_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("genref") == tmp_path / "rflow_jax" / "genref"


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path):
    write_shards(tmp_path / "a", 2, 8)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    a, b = opened(tmp_path / "a"), opened(tmp_path / "b")
    assert a.fingerprint == b.fingerprint
    with FileServer(tmp_path / "a") as server:
        remote = open_tars(server.url + "/{000,001}.tar", cache=tmp_path / "cache", retry=QUICK, show=False)
        assert remote.fingerprint == a.fingerprint
        turned = open_tars(server.url + "/{001,000}.tar", cache=tmp_path / "cache", retry=QUICK, show=False)
        assert turned.fingerprint != a.fingerprint
    write_shards(tmp_path / "b", 2, 9)
    assert opened(tmp_path / "b").fingerprint != a.fingerprint


def test_a_shard_that_changes_under_a_run_is_an_error(tmp_path):
    (path,) = write_shards(tmp_path, 1, 4)
    source = opened(tmp_path)
    path.write_bytes(shard_bytes(keys_of(0, 40)))
    with pytest.raises(InputError, match="start again to index it"):
        source.read("rule", 0)


def test_a_remote_shard_is_indexed_by_hopping(tmp_path):
    large = {"good_image.jpg": bytes(5 << 20), "bad_image.jpg": bytes(5 << 20)}
    named = [(f"{key}.{n}", large.get(n, c)) for key, s in keys_of(0, 4).items() for n, c in members(key, s).items()]
    (tmp_path / "a.tar").write_bytes(tar_bytes(named))
    with FileServer(tmp_path) as server:
        source = open_tars(server.url + "/a.tar", cache=tmp_path / "cache", retry=QUICK, show=False)
        assert server.sent < 300_000
        assert source.counts == dict.fromkeys(SUBSETS, 1)
        server.requests.clear()
        assert source.read("editing", 0).prompt == "prompt of 000_0003"
        assert len(server.requests) == 1


def test_members_of_genrefs_kind_are_read_through(tmp_path, capsys):
    """Two pictures of hundreds of kB a record: many records a request, and the cost is said before."""
    pictures = {"good_image.jpg": bytes(300_000), "bad_image.jpg": bytes(300_000)}
    samples = [(key, n, pictures.get(n, c)) for key, s in keys_of(0, 60).items() for n, c in members(key, s).items()]
    size = (tmp_path / "a.tar").write_bytes(tar_bytes((f"{key}.{name}", content) for key, name, content in samples))
    with FileServer(tmp_path) as server:
        source = open_tars(server.url + "/a.tar", cache=tmp_path / "cache", retry=QUICK)
        assert sum(source.counts.values()) == 60
        assert len(server.requests) < 10
        assert server.sent <= size + 1
        said = capsys.readouterr().err
        assert said.startswith(f"indexing 1 remote shards, once: up to {size / 1e9:.1f} GB in 3 requests")
        assert str(tmp_path / "cache") in said
        open_tars(server.url + "/a.tar", cache=tmp_path / "cache", retry=QUICK)
        assert capsys.readouterr().err == ""


def test_small_remote_members_do_not_cost_a_request_each(tmp_path):
    (path,) = write_shards(tmp_path, 1, 200)
    with FileServer(tmp_path) as server:
        open_tars(server.url + "/000.tar", cache=tmp_path / "cache", retry=QUICK, show=False)
        assert len(server.requests) < 12
        assert server.sent < 1.1 * path.stat().st_size


@pytest.mark.parametrize("faults", [Faults(dead=3), Faults(cut=3), Faults(status=3), Faults(stall=1, seconds=0.8)])
def test_faults_of_a_server_are_survived(tmp_path, faults):
    write_shards(tmp_path, 1, 8)
    with FileServer(tmp_path, faults) as server:
        source = open_tars(server.url + "/000.tar", cache=tmp_path / "cache", retry=QUICK, show=False)
        assert everything(source) == expected(keys_of(0, 8))


def test_a_server_without_ranges_is_an_error_and_never_wrong_bytes(tmp_path):
    write_shards(tmp_path, 1, 8)
    with FileServer(tmp_path) as server:
        source = open_tars(server.url + "/000.tar", cache=tmp_path / "cache", retry=QUICK, show=False)
        server.faults = Faults(ranges=False)
        with pytest.raises(InputError, match="does not serve byte ranges"):
            source.read("rule", 1)
        with pytest.raises(InputError, match=r"/000\.tar: the server does not serve byte ranges; stream the shards"):
            open_tars(server.url + "/000.tar?x", cache=tmp_path / "other", retry=QUICK, show=False)
        server.faults = Faults(shift=3)
        with pytest.raises(InputError, match="came instead of"):
            source.read("rule", 1)


def test_a_server_that_goes_away_is_no_damage_of_the_shard(tmp_path, monkeypatch):
    """Else the samples behind would be missing for good: the index is kept."""
    write_shards(tmp_path, 1, 200)
    with FileServer(tmp_path) as server:
        monkeypatch.setattr("rflow_jax.data.storage.shards.LARGE_BLOCK", 2**14)
        shard = expand(server.url + "/000.tar")[0]
        read = RangeFile.read

        def late(file, size=-1):
            server.faults.dead = 99 if file.tell() > 2**15 else 0
            return read(file, size)

        monkeypatch.setattr(RangeFile, "read", late)
        with pytest.raises(InputError, match=r"000\.tar: .*\(2 attempts\); check the address"):
            index_shards([shard], tmp_path / "cache", retry=RetryPolicy(0.5, 1, 0.01), show=False)
    assert not list((tmp_path / "cache").glob("*.npz"))


def test_a_pointer_in_place_of_a_shard_is_named(tmp_path):
    (tmp_path / "a.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(InputError, match=r"a\.tar: a Git LFS pointer"):
        opened(tmp_path)


def test_a_pipe_cannot_be_indexed(tmp_path):
    with pytest.raises(InputError, match="stream it"):
        open_tars("pipe:cat x", cache=tmp_path, show=False)


def _read_in_child(source, queue):
    queue.put(everything(source))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_too(tmp_path, method):
    write_shards(tmp_path, 1, 8)
    with FileServer(tmp_path) as server:
        source = open_tars(server.url + "/000.tar", cache=tmp_path / "cache", retry=QUICK, show=False)
        here = everything(source)
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=_read_in_child, args=(source, queue))
        child.start()
        assert queue.get(timeout=60) == here
        child.join(10)
        assert everything(source) == here


def _open_in_child(url, cache, queue):
    queue.put(open_tars(url, cache=cache, retry=QUICK, show=False).counts)


def test_processes_with_one_cache_share_the_work(tmp_path):
    """Each shard is read once, whoever begins with it."""
    shards = write_shards(tmp_path, 6, 40)
    with FileServer(tmp_path) as server:
        url, cache = server.url + "/{000..005}.tar", tmp_path / "cache"
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        children = [context.Process(target=_open_in_child, args=(url, cache, queue)) for _ in range(3)]
        for child in children:
            child.start()
        counts = [queue.get(timeout=60) for _ in children]
        for child in children:
            child.join(10)
    assert counts == [dict.fromkeys(SUBSETS, 60)] * 3
    beyond_probes = [path for path, wanted in server.requests if wanted != "bytes=0-0"]
    assert sorted({path: beyond_probes.count(path) for path in beyond_probes}.values()) == [2] * 6
    assert len(list(cache.iterdir())) == len(shards)


def test_an_index_is_compact(tmp_path):
    write_shards(tmp_path, 1, 4)
    source = opened(tmp_path)
    one = len(pickle.dumps(source))
    write_shards(tmp_path, 1, 404)
    assert len(pickle.dumps(opened(tmp_path))) - one < 400 * 130
    assert json.loads(json.dumps(source.counts)) == source.counts


def test_nothing_is_logged_when_all_is_well(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_shards(tmp_path, 2, 8)
    opened(tmp_path)
    assert caplog.text == ""
