"""Patterns of shards, and byte ranges of them."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.data.storage import http
from rflow_jax.data.storage.retry import RetryPolicy, TransientError, enforce_min_throughput, public, with_retries
from rflow_jax.data.storage.shards import RangeFile, Shard, expand, read_range
from rflow_jax.errors import InputError
from tests.kit.file_server import Faults, FileServer

QUICK = RetryPolicy(timeout=0.5, max_retries=3, max_backoff=0.02)
CONTENT = bytes(range(256)) * 2000


@pytest.fixture
def folder(tmp_path):
    for name in ("b.tar", "a.tar", "001.tar", "002.tar", "010.tar"):
        (tmp_path / name).write_bytes(CONTENT)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.tar").write_bytes(b"x")
    return tmp_path


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    for name in ("a.tar", "b.tar", "c.txt"):
        fs.pipe_file(f"/bucket/{name}", CONTENT)
    yield fs
    fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.tar", ["001.tar", "002.tar", "010.tar", "a.tar", "b.tar"]),
        ("{001..002}.tar", ["001.tar", "002.tar"]),
        ("{b,a}.tar", ["b.tar", "a.tar"]),
        ("0[01]?.tar", ["001.tar", "002.tar", "010.tar"]),
        ("", ["001.tar", "002.tar", "010.tar", "a.tar", "b.tar"]),
        ("**/*.tar", ["001.tar", "002.tar", "010.tar", "a.tar", "b.tar", "c.tar"]),
        ("sub/c.tar", ["c.tar"]),
    ],
)
def test_local_patterns(folder, pattern, names):
    shards = expand(f"{folder}/{pattern}")
    assert [shard.name for shard in shards] == names
    assert all(os.path.isabs(shard.url) and shard.version and shard.is_local for shard in shards)
    assert shards[0].size == os.path.getsize(shards[0].url)


def test_several_patterns_and_a_name_with_a_star_in_it(folder, monkeypatch):
    (folder / "odd[1].tar").write_bytes(b"x")
    shards = expand([f"{folder}/b.tar", f"file://{folder}/a.tar", f"{folder}/[ab].tar", f"{folder}/odd[1].tar"])
    assert [shard.name for shard in shards] == ["b.tar", "a.tar", "odd[1].tar"]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert expand("b.tar") == expand("~/b.tar") == [shards[0]]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{F}/none*.tar", r"none\*.tar: no shard matches"),
        ("{F}/{001..003}.tar", "003.tar: no shard matches"),
        ("{F}/{001..002.tar", "braces do not match"),
        ("{F}/sub/sub", "no shard matches"),
        ("pipe:cat x", "set allow_shell to true"),
        ("https://example.org/*.tar", "no folder can be listed over HTTP"),
        ("memory://none/*.tar", "no shard matches"),
        ("memory://none/a.tar", "no shard matches"),
        ("nonsense://none/a.tar", "nonsense"),
    ],
)
def test_what_cannot_be_expanded(folder, pattern, words):
    with pytest.raises(InputError, match=words) as caught:
        expand(pattern.replace("{F}", str(folder)), retry=QUICK)
    assert "\n" not in str(caught.value)


def test_no_pattern_at_all():
    with pytest.raises(InputError, match="name at least one"):
        expand([])


def test_pipes_are_permitted_by_a_flag():
    (shard,) = expand(r"pipe:awk '{print $1}' x\ y", allow_shell=True)
    assert (shard.url, shard.size, shard.is_pipe, shard.is_local) == (r"pipe:awk '{print $1}' x\ y", None, True, False)
    assert [s.url for s in expand("pipe:cat {1..2}.tar", allow_shell=True)] == ["pipe:cat 1.tar", "pipe:cat 2.tar"]


def test_a_store_of_fsspec(memory):
    shards = expand(["memory://bucket/*.tar", "memory://bucket/{a.tar,c.txt}"], retry=QUICK)
    assert [shard.name for shard in shards] == ["a.tar", "b.tar", "c.txt"]
    assert all(shard.size == len(CONTENT) and shard.version for shard in shards)
    assert read_range(shards[0], 1000, 5000, QUICK) == CONTENT[1000:6000]
    with pytest.raises(InputError, match="came instead of"):
        read_range(shards[0], len(CONTENT) - 10, 20, QUICK)
    memory.rm("/bucket/a.tar")
    with pytest.raises(InputError, match=r"a\.tar"):
        read_range(shards[0], 0, 10, QUICK)


def test_http_addresses(folder):
    with FileServer(folder) as server:
        shards = expand(server.url + "/{001..002}.tar?token=secret", retry=QUICK)
        assert [(shard.name, shard.size) for shard in shards] == [(n, len(CONTENT)) for n in ("001.tar", "002.tar")]
        assert shards[0].version
        assert "secret" not in shards[0].shown
        with pytest.raises(InputError, match=r"003\.tar: status 404"):
            expand(server.url + "/003.tar", retry=QUICK)
        server.faults.ranges = False
        assert expand(server.url + "/001.tar?token=secret", retry=QUICK) == shards[:1]


def test_secrets_are_not_shown():
    assert public("https://user:pass@host/a.tar?signature=x") == "https://host/a.tar"
    assert public("/a/b?c@d.tar") == "/a/b?c@d.tar"


@given(start=st.integers(0, len(CONTENT) - 1), length=st.integers(0, 5000))
def test_local_ranges(tmp_path_factory, start, length):
    file = tmp_path_factory.getbasetemp() / "ranges.tar"
    file.write_bytes(CONTENT)
    (shard,) = expand(str(file))
    length = min(length, len(CONTENT) - start)
    assert read_range(shard, start, length) == CONTENT[start : start + length]


def test_local_failures(folder):
    (shard,) = expand(f"{folder}/a.tar")
    with pytest.raises(InputError, match=r"a\.tar: ends at byte"):
        read_range(shard, len(CONTENT) - 5, 10, QUICK)
    (folder / "a.tar").write_bytes(b"x")
    with pytest.raises(InputError, match="1 bytes, 512000 when it was looked up"):
        read_range(shard, 0, 1)
    (folder / "a.tar").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_range(shard, 0, 1)
    with pytest.raises(InputError, match="stream it"):
        read_range(Shard("pipe:cat", None, ""), 0, 1)


@pytest.mark.parametrize(
    "faults",
    [Faults(), Faults(dead=3), Faults(status=3), Faults(cut=3), Faults(stall=2, seconds=2), Faults(redirect=True)],
)
def test_http_ranges(folder, faults):
    with FileServer(folder, faults) as server:
        shard = Shard(server.url + "/a.tar", len(CONTENT), "")
        assert read_range(shard, 1000, 50000, QUICK) == CONTENT[1000:51000]


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (Faults(dead=99), r"a\.tar: .*\(4 attempts\); check the address"),
        (Faults(status=99), r"a\.tar: status 503 \(4 attempts\)"),
        (Faults(cut=99), "4 attempts"),
        (Faults(shift=7), "came instead of"),
        (Faults(ranges=False), "does not serve byte ranges"),
    ],
)
def test_http_failures(folder, faults, words):
    with FileServer(folder, faults) as server, pytest.raises(InputError, match=words) as caught:
        read_range(Shard(server.url + "/a.tar?secret=1", len(CONTENT), ""), 1000, 50000, QUICK)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_http_shards_that_changed_or_went(folder):
    with FileServer(folder) as server:
        with pytest.raises(InputError, match="512000 bytes, 5 when it was indexed"):
            read_range(Shard(server.url + "/a.tar", 5, ""), 0, 5, QUICK)
        with pytest.raises(InputError, match="512000 bytes, 999999 when"):
            read_range(Shard(server.url + "/a.tar", 999999, ""), 999000, 5, QUICK)
        with pytest.raises(InputError, match="status 404"):
            read_range(Shard(server.url + "/z.tar", 5, ""), 0, 5, QUICK)
    with pytest.raises(InputError, match=r"4 attempts"):  # nobody listens there any more
        read_range(Shard(server.url + "/a.tar", 5, ""), 0, 5, QUICK)


def test_a_redirection_is_followed_once_until_it_expires(folder):
    with FileServer(folder, Faults(redirect=True)) as server:
        shard = Shard(server.url + "/a.tar", len(CONTENT), "")
        for start in range(5):
            assert read_range(shard, start, 9, QUICK) == CONTENT[start : start + 9]
        assert len(server.requests) == 6
        server.faults.signature = 1
        assert read_range(shard, 5, 9, QUICK) == CONTENT[5:14]


def test_threads_share_the_client(folder):
    with FileServer(folder) as server:
        shard = Shard(server.url + "/a.tar", len(CONTENT), "")
        found: dict[int, bytes] = {}
        threads = [
            threading.Thread(target=lambda i=i: found.__setitem__(i, read_range(shard, i * 100, 300, QUICK)))
            for i in range(32)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: CONTENT[i * 100 : i * 100 + 300] for i in range(32)}


def test_a_slow_sender_is_given_up():
    def drip():
        import time

        for _ in range(100):
            time.sleep(0.01)
            yield b"x"

    with pytest.raises(TransientError, match="too slow"):
        list(enforce_min_throughput(drip(), 0.05))
    assert len(list(enforce_min_throughput(drip(), 30.0))) == 100


def test_a_server_says_how_long_to_wait(monkeypatch):
    pauses = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=pauses.append))
    left = [TransientError("busy", 1e9), TransientError("busy", 70.0), TransientError("busy")]

    def attempt():
        if left:
            raise left.pop()
        return 3

    assert with_retries(attempt, "x", RetryPolicy(max_retries=3)) == 3
    assert pauses[0] <= 0.5
    assert pauses[1:] == [70.0, 300.0]


@given(jumps=st.lists(st.tuples(st.integers(0, len(CONTENT) + 10), st.integers(0, 70000)), max_size=8))
def test_a_range_file_is_a_file(memory_shard, jumps):
    file = RangeFile(memory_shard)
    for start, length in jumps:
        assert file.seek(start) == start
        assert file.read(length) == CONTENT[start : start + length]
        assert file.tell() == start + len(CONTENT[start : start + length])
    file.seek(-7, os.SEEK_END)
    file.seek(2, os.SEEK_CUR)
    assert file.read() == CONTENT[-5:]


@pytest.fixture(scope="module")
def memory_shard():
    fsspec.filesystem("memory").pipe_file("/module/a.tar", CONTENT)
    return Shard("memory://module/a.tar", len(CONTENT), "")


def test_a_shard_of_unknown_size_has_no_ranges():
    with pytest.raises(InputError, match="does not report its size"):
        RangeFile(Shard("https://example.org/a.tar", None, ""))


def test_what_is_sent_to_workers_is_small_and_plain():
    shard = Shard("https://example.org/a.tar", 5, "v")
    assert pickle.loads(pickle.dumps((shard, QUICK))) == (shard, QUICK)


@pytest.mark.parametrize(
    ("name", "value"),
    [("timeout", 0.0), ("timeout", math.nan), ("max_retries", -1), ("max_backoff", math.nan)],
)
def test_bad_patience(name, value):
    with pytest.raises(InputError, match=f"^retry.{name} is {value}: give "):
        RetryPolicy(**{name: value})


def test_addresses_of_the_hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    address, headers = http._address("hf://datasets/owner/name@refs%2Fpr%2F1/some/a.tar")
    assert address.endswith("/datasets/owner/name/resolve/refs%2Fpr%2F1/some/a.tar")
    assert headers["authorization"] == "Bearer hf_secret"
    with pytest.raises(InputError, match="not of the form"):
        http._address("hf://datasets/owner")


class _Hub(BaseHTTPRequestHandler):
    """The kinds of request that listing and reading a data set on the Hub makes."""

    protocol_version = "HTTP/1.1"

    FOLDER = json.dumps([{"type": "directory", "oid": "d", "path": "data"}]).encode()

    def do_POST(self):  # what is known of a path
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(200, self.FOLDER)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/api/datasets/o/n/tree/main":
            return self._reply(200, self.FOLDER)
        if path.startswith("/api/datasets/o/n/tree/"):
            files = [{"type": "file", "oid": f"id{i}", "size": 100, "path": f"data/{i:03d}.tar"} for i in range(3)]
            return self._reply(200, json.dumps(files).encode())
        if path.startswith("/api/datasets/o/n"):
            return self._reply(200, json.dumps({"id": "o/n", "_id": "1", "sha": "0" * 40}).encode())
        if path == "/datasets/o/n/resolve/main/data/001.tar":
            return self._reply(206, CONTENT[10:20], {"Content-Range": "bytes 10-19/100"})
        return self._reply(404, b"{}")

    def _reply(self, status, body, extra=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_the_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    code = """if True:
        from rflow_jax.data.storage.shards import expand
        from rflow_jax.data.storage.shards import read_range
        shards = expand("hf://datasets/o/n/data/*.tar")
        named = expand("hf://datasets/o/n/data/{001..002}.tar")
        print([(s.url, s.size, s.version) for s in shards] , named == shards[1:], read_range(shards[1], 10, 10))
    """
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    server.shutdown()
    want = [(f"hf://datasets/o/n/data/{i:03d}.tar", 100, f"id{i}") for i in range(3)]
    assert done.stdout == f"{want} True {CONTENT[10:20]}\n", done.stderr


def test_importing_is_quick():
    heavy = ("httpx", "fsspec", "huggingface_hub", "jax", "tenacity")
    code = f"import sys, rflow_jax.data.sources.tar; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
