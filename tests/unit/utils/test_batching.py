"""Items one by one prepared, batch by batch worked on: order, errors of single ones, bounded memory, overlap."""

from __future__ import annotations

import json
import shutil
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.errors import InputError
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.utils.batching import BATCHES_AT_ONCE, CLOSED, map_batched


@given(st.lists(st.integers(-5, 5), max_size=60), st.integers(1, 4))
def test_one_result_an_item_in_order_and_reasons_for_the_others(items, batch_size):
    def prepare(item):
        if item < 0:
            raise InputError(f"{item} is negative")
        return item

    seen = []

    def work(ready):
        assert ready
        assert len(ready) <= BATCHES_AT_ONCE * batch_size
        seen.extend(ready)
        return [10 * item for item in ready]

    found = map_batched(items, prepare, work, batch_size=batch_size)
    assert [str(one) if isinstance(one, InputError) else one for one in found] == [
        10 * item if item >= 0 else f"{item} is negative" for item in items
    ]
    assert seen == [item for item in items if item >= 0]


def test_once_closed_nothing_more_is_begun():
    closed = threading.Event()

    def work(ready):
        closed.set()
        return ready

    found = map_batched(range(20), lambda item: item, work, batch_size=2, closed=closed)
    assert found[: 2 * BATCHES_AT_ONCE] == list(range(2 * BATCHES_AT_ONCE))
    assert [str(one) for one in found[2 * BATCHES_AT_ONCE :]] == [CLOSED] * (20 - 2 * BATCHES_AT_ONCE)


def test_items_are_prepared_while_the_ones_before_are_worked_on():
    """The work on the first waits until one of the next is prepared: without overlap it would wait for ever."""
    step, next_prepared = BATCHES_AT_ONCE, threading.Event()

    def prepare(item):
        if item >= step:
            next_prepared.set()
        return item

    def work(ready):
        assert next_prepared.wait(20)
        return ready

    assert map_batched(range(2 * step), prepare, work, batch_size=1) == list(range(2 * step))


def test_no_more_than_two_parts_are_in_memory():
    """However many items there are."""
    alive, most, lock = 0, 0, threading.Lock()

    def prepare(item):
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return item

    def work(ready):
        nonlocal alive
        time.sleep(0.01)
        with lock:
            alive -= len(ready)
        return ready

    map_batched(range(100 * BATCHES_AT_ONCE), prepare, work, batch_size=1)
    assert most <= 2 * BATCHES_AT_ONCE


def test_a_bug_is_no_error_of_an_item():
    def prepare(item):
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        map_batched([1, 0], prepare, list, batch_size=1)
    with pytest.raises(ValueError, match="zip"):
        map_batched([1, 2], lambda item: item, lambda ready: [], batch_size=1)


def test_nothing_is_worked_on_without_items():
    assert map_batched([], lambda item: item, pytest.fail, batch_size=1) == []


def test_threads_may_share_a_tokenizer(golden, tmp_path):
    """Even one whose file asks for a limit: the first call puts that aside, and must not do so in a thread."""
    folder = golden / "qwen" / "base"
    shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    texts = [f"two red apples and {k} benches " * 50 for k in range(200)]
    want = [len(QwenTokenizer(folder).encode(text)) for text in texts[:1]]
    tokenizer = QwenTokenizer(tmp_path / "base")
    found = map_batched(texts, tokenizer.encode, list, batch_size=8)
    assert len(found[0]) == want[0]
    assert all(np.array_equal(one, tokenizer.encode(text)) for one, text in zip(found, texts, strict=True))
