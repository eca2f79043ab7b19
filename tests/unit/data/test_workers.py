"""What worker processes make, and the memory it comes back through."""

import gc
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest

from rflow_jax.data import workers as workers_module
from rflow_jax.data.workers import SharedBufferPool, Workers, write_pieces
from tests.kit.made import die, fail, make_arrays

SIZES = [0, 1, 5_000_000, 3, 700, 5_000_000, 12_000_000]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_arrays_and_the_rest_come_back_as_they_were_made(count):
    with Workers(make_arrays, count) as workers:
        for asked, future in [(size, workers.submit(size)) for size in SIZES * 3]:
            (text, arrays), want = future.result(timeout=60), make_arrays(asked)
            assert text == want[0]
            for got, expected in zip(arrays, want[1], strict=True):
                np.testing.assert_array_equal(got, expected)
                assert got.dtype == expected.dtype


@pytest.mark.parametrize("count", [0, 1])
def test_what_is_kept_does_not_change_when_more_is_made(count):
    with Workers(make_arrays, count) as workers:
        kept = [workers.submit(size).result(timeout=60)[1] for size in (900, 1000)]
        part = workers.submit(5000).result(timeout=60)[1][0][17:4000:3]  # a view outlives its array
        for future in [workers.submit(size) for size in range(1000, 1200)]:
            future.result(timeout=60)
    for size, arrays in zip((900, 1000), kept, strict=True):
        for got, expected in zip(arrays, make_arrays(size)[1], strict=True):
            np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(part, make_arrays(5000)[1][0][17:4000:3])


def test_an_error_is_raised_where_the_result_is_asked_for():
    with Workers(fail, 1) as workers:
        bad, again = workers.submit("this"), workers.submit("that")
        with pytest.raises(ValueError, match="no this"):
            bad.result(timeout=60)
        with pytest.raises(ValueError, match="no that"):
            again.result(timeout=60)


def test_a_dead_process_is_an_error_now_and_later():
    with Workers(die, 1) as workers:
        for _ in range(2):
            with pytest.raises(BrokenProcessPool):
                workers.submit("x").result(timeout=60)


@pytest.mark.parametrize("count", [0, 1])
def test_what_hangs_is_not_waited_for(count, monkeypatch):
    monkeypatch.setattr(workers_module, "GRACE", 0.2)
    workers = Workers(time.sleep, count)
    workers.submit(0.0).result(timeout=60)
    before = set(multiprocessing.active_children())
    hanging, waiting = workers.submit(600.0), workers.submit(0.0)
    time.sleep(0.5)  # until it is under way
    begin = time.monotonic()
    workers.close()
    assert time.monotonic() - begin < 5
    assert waiting.cancelled() or waiting.exception(timeout=5)
    assert not before & set(multiprocessing.active_children())
    assert count == 0 or hanging.exception(timeout=5)


def test_a_process_ends_though_its_thread_hangs():
    script = """
import time
from rflow_jax.data import workers
workers.GRACE = 0.2
with workers.Workers(time.sleep, 0) as some:
    some.submit(600.0)
    time.sleep(0.2)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_memory_is_used_again_once_nothing_lies_in_it():
    slabs = SharedBufferPool()
    slab = slabs.take()
    write_pieces(slab.path, [memoryview(b"abc"), memoryview(b"defg")])
    first, second = slabs.views(slab, [3, 4])
    assert bytes(first) == b"abc"
    assert bytes(second) == b"defg"
    assert slabs.take() is not slab
    view = second[1:]
    del first, second
    gc.collect()
    assert slabs.take() is not slab
    del view
    gc.collect()
    assert slabs.take() is slab
