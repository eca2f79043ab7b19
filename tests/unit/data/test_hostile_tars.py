"""Tars that declare or deliver too much: a sample or the rest of the shard is left out, in bounded memory and time."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from rflow_jax.data.sources import tar_members
from rflow_jax.data.sources.stream import Buffers
from rflow_jax.data.sources.stream_shards import ProcessShare, RecordStream, ShardAssignment, read_shard
from rflow_jax.data.sources.tar import open_tars
from rflow_jax.data.sources.tar_index import build_index
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import Shard
from tests.kit.genref_tars import members, shard_bytes

FIRST, LAST = (shard_bytes({key: "general"})[:-1024].rstrip(b"\0") for key in ("000_1", "000_9"))


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def shard(path: Path) -> Shard:
    return Shard(str(path), path.stat().st_size, "1")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT)


def between(*parts: bytes) -> bytes:
    """Two whole samples, and something between."""
    return padded(FIRST) + b"".join(map(padded, parts)) + padded(LAST) + bytes(1024)


def both(tmp_path: Path, content: bytes) -> tuple[list[tuple[str, str]], list[str], str]:
    """(key and trouble of each sample of the stream, the keys of the index, its damage)."""
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    began = time.monotonic()
    streamed = [(raw.key, raw.trouble) for raw in read_shard(shard(path), RetryPolicy(max_retries=0))]
    index = build_index(shard(path))
    assert time.monotonic() - began < 5
    return streamed, [index.key(row) for row in range(len(index))], index.troubles.damage


@pytest.mark.parametrize(
    "part",
    [
        header("x", 0, tarfile.SYMTYPE, "/etc/passwd"),
        header("000_5.good_image.jpg", 0, tarfile.LNKTYPE, "../../secret.jpg"),
        header("/dev/null", 0, tarfile.CHRTYPE),
        header("pipe", 0, tarfile.FIFOTYPE),
        header("folder", 0, tarfile.DIRTYPE),
        header("README", 3) + b"abc",
        header("a" * 5000 + ".good_image.jpg", 3) + b"abc",
        header("other.json", 2000) + b"x" * 2000,
    ],
)
def test_links_devices_and_other_files_are_left_out(tmp_path, part):
    streamed, indexed, damage = both(tmp_path, between(part))
    assert [key for key, trouble in streamed if not trouble] == indexed == ["000_1", "000_9"]
    assert not damage


def test_names_outside_the_folder_are_names_only(tmp_path):
    files = [(f"../../{tmp_path.name}-x.{name}", content) for name, content in members("k", "rule").items()]
    files += [(f"/etc/rflow.{name}", content) for name, content in members("k", "rule").items()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    streamed, indexed, _ = both(tmp_path, buffer.getvalue())
    assert len(indexed) == len(streamed) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (header("x.bin", 2**35), "bytes"),  # more than the shard has
        (header("x", -512), "size below 0"),
        (header("x", 2**31, tarfile.GNUTYPE_LONGNAME), "are read at most"),
        (header("x", -1, tarfile.GNUTYPE_LONGNAME), "are read at most"),
        (header("x", 2**40, tarfile.XHDTYPE), "are read at most"),
        (header("x", 2**40, tarfile.XGLTYPE), "are read at most"),
        (padded(header("x", 3, tarfile.XHDTYPE) + b"0 a") * 3, ""),
        (padded(header("x", 2, tarfile.GNUTYPE_LONGNAME) + b"a\0") * 2000, "headers of one member"),
        (padded(header("x", 20, tarfile.XHDTYPE) + b"20 size=-99999999999\n"[:20]), ""),
    ],
)
def test_a_header_is_not_believed(tmp_path, part, reason):
    streamed, indexed, damage = both(tmp_path, between(part))
    assert streamed[0] == ("000_1", "")
    assert indexed[0] == "000_1"
    if reason:
        assert reason in streamed[-1][1]
        assert damage
        assert len(streamed[-1][1]) < 500


def sparse(name: str, size: int) -> bytes:
    """A sparse member of GNU tar that stands for ``size`` bytes of zeros."""
    block = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE))
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_sparse_members_are_left_out_whatever_they_stand_for(tmp_path):
    streamed, indexed, damage = both(tmp_path, between(sparse("000_5.good_image.jpg", 8 * 10**9)))
    assert [key for key, trouble in streamed if not trouble] == indexed == ["000_1", "000_9"]
    assert not damage


def test_a_member_over_its_limit_costs_its_sample(tmp_path, monkeypatch):
    limits = (400, 10**6, 10**6, 10**6, 64)
    monkeypatch.setattr(tar_members, "LARGEST", limits)
    monkeypatch.setattr("rflow_jax.data.sources.stream_shards.LARGEST", limits)
    files = {**members("000_5", "rule"), "good_image.jpg": b"x" * 401}
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(f"000_5.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        part = buffer.getvalue()[:-1024].rstrip(b"\0")
    small = {name: content[:300] for name, content in members("000_1", "rule").items()}
    assert all(len(content) <= 400 for name, content in small.items() if name.startswith("good"))
    path = tmp_path / "a.tar"
    path.write_bytes(padded(part) + bytes(1024))
    (raw,) = read_shard(shard(path), RetryPolicy(max_retries=0))
    assert raw.trouble == "has 401 bytes as good_image, and 400 are read at most"
    assert build_index(shard(path)).troubles.named == [f"000_5 {raw.trouble}"]


BOMBS = """
import resource, sys
from rflow_jax.data.sources.stream_shards import read_shard
from rflow_jax.data.storage.retry import RetryPolicy
from rflow_jax.data.storage.shards import Shard
resource.setrlimit(resource.RLIMIT_DATA, (2**29, 2**29))
for path in sys.argv[1:]:
    print([(raw.key, raw.trouble) for raw in read_shard(Shard(path, None, ""), RetryPolicy(max_retries=0))])
"""


def test_a_small_tar_gz_of_gigabytes_is_read_in_bounded_memory(tmp_path):
    zeros = gzip.compress(bytes(2**24), 9)
    for name, size in (("000_5.good_image.jpg", 2**29), ("000_5.prompt.txt", 2**29), ("other.bin", 2**34)):
        with open(tmp_path / f"{size}{name}.tar.gz", "wb") as file:
            file.write(gzip.compress(padded(FIRST) + header(name, size)))
            file.write(zeros * (size // 2**24 if size < 2**34 else 40))
    paths = sorted(map(str, tmp_path.glob("*.gz")))
    done = subprocess.run([sys.executable, "-c", BOMBS, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("are read at most") == 2
    assert done.stdout.count("are passed over at most") == 1
    assert done.stdout.count("('000_1', '')") == 3


def test_a_buffer_of_large_records_holds_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr("rflow_jax.data.sources.stream._LARGEST_MEAN", 300)
    path = tmp_path / "a.tar"
    path.write_bytes(shard_bytes({f"000_{n}": "general" for n in range(60)}))
    route = ShardAssignment([shard(path)], ProcessShare.of([0], 1), 0)
    buffers = Buffers(RecordStream(route, RetryPolicy()), route, ["general"], 40, 0)
    drawn = [buffers.draw("general", number) for number in range(60)]
    held = max(sum(one.raw.nbytes for one in job.spares) for job in drawn)
    assert 40 * 200 < held < 40 * 300 + 3000
    again = Buffers(RecordStream(route, RetryPolicy()), route, ["general"], 40, 0)
    assert [again.draw("general", number).raw for number in range(60)] == [job.raw for job in drawn]


def test_an_index_that_does_not_fit_its_shard_is_made_again(tmp_path, caplog):
    import numpy as np

    path = tmp_path / "a.tar"
    path.write_bytes(shard_bytes({"000_1": "general", "000_2": "rule"}))
    open_tars(str(path), cache=tmp_path / "cache", show=False)
    (file,) = (tmp_path / "cache").iterdir()
    with np.load(file) as stored:
        arrays = dict(stored)
    wrong = [
        {"sizes": arrays["sizes"] + 10**12},
        {"offsets": arrays["offsets"] - 10**6},
        {"subsets": arrays["subsets"] + 9},
        {"key_ends": arrays["key_ends"][:1]},
        {"subsets": np.array([{}, []], object)},  # a pickle
        {"troubles": np.frombuffer(json.dumps({"samples": "x"}).encode(), np.uint8)},
        {"keys": np.zeros(2**22, np.uint8)},
    ]
    for change in wrong:
        np.savez(file, **arrays | change)
        caplog.clear()
        assert open_tars(str(path), cache=tmp_path / "cache", show=False).counts["rule"] == 1
        assert "damaged, so the shard is indexed again" in caplog.text
