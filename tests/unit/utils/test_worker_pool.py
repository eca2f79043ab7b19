"""Pools of threads that ask a model."""

import atexit
import os
import threading
import time
import weakref

import pytest

import rflow_jax.utils.worker_pool
from rflow_jax.utils.worker_pool import BatchingPool, wait_for

PATIENCE = 20.0


class Heard:
    """Takes results and errors, and waits for them."""

    def __init__(self) -> None:
        self.results: list[tuple[object, object]] = []
        self.errors: list[BaseException] = []
        self.changed = threading.Condition()

    def result(self, work: object, result: object) -> None:
        with self.changed:
            self.results.append((work, result))
            self.changed.notify_all()

    def error(self, error: BaseException) -> None:
        with self.changed:
            self.errors.append(error)
            self.changed.notify_all()

    def wait_for(self, results: int = 0, errors: int = 0) -> None:
        with self.changed:
            assert self.changed.wait_for(
                lambda: len(self.results) >= results and len(self.errors) >= errors, PATIENCE
            ), (self.results, self.errors)


class Gate:
    """A call that waits until it may answer; counts how many wait."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[list[object]] = []
        self.changed = threading.Condition()

    def __call__(self, works):
        with self.changed:
            self.batches.append(list(works))
            self.changed.notify_all()
        assert self.open.wait(PATIENCE)
        return [f"on {work}" for work in works]

    def wait_for(self, calls: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.batches) >= calls, PATIENCE)


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


def idle(calls: BatchingPool) -> None:
    """Waits until nothing is asked: that comes a moment after the last result is told."""
    end = time.monotonic() + PATIENCE
    while calls.asked and time.monotonic() < end:
        time.sleep(0.001)
    assert calls.asked == 0


def test_so_many_calls_at_once_and_no_more(gate, heard):
    calls = BatchingPool("x", gate, 3, 1, heard.result, heard.error)
    for work in range(8):
        calls.submit(work)
    gate.wait_for(3)
    assert calls.asked == 8
    assert len(gate.batches) == 3
    gate.open.set()
    heard.wait_for(results=8)
    idle(calls)
    assert sorted(heard.results) == [(work, f"on {work}") for work in range(8)]
    calls.close()


def test_works_that_wait_together_are_asked_together(gate, heard):
    calls = BatchingPool("x", gate, 1, 3, heard.result, heard.error)
    calls.submit("first")
    gate.wait_for(1)
    for work in range(5):
        calls.submit(work)
    gate.open.set()
    heard.wait_for(results=6)
    assert gate.batches == [["first"], [0, 1, 2], [3, 4]]
    assert heard.results == [(work, f"on {work}") for work in ("first", 0, 1, 2, 3, 4)]
    calls.close()


def test_an_exception_is_reported_and_the_thread_goes_on(heard):
    def call(works):
        if works == ["bad"]:
            raise SystemExit("even this")
        if works == ["short"]:
            return []
        return works

    calls = BatchingPool("x", call, 1, 1, heard.result, heard.error)
    for work in ("bad", "short", "good"):
        calls.submit(work)
    heard.wait_for(results=1, errors=2)
    idle(calls)
    assert heard.results == [("good", "good")]
    assert [type(error) for error in heard.errors] == [SystemExit, ValueError]
    calls.close()


def test_an_exception_while_a_result_is_told_is_reported_too(heard):
    def told(work, result):
        raise RuntimeError("full disk")

    calls = BatchingPool("x", list, 1, 1, told, heard.error)
    calls.submit(1)
    heard.wait_for(errors=1)
    idle(calls)
    assert str(heard.errors[0]) == "full disk"
    calls.close()


def test_a_work_counts_as_asked_until_its_result_is_told():
    """Whoever sees nothing asked may take it that no result will come."""
    counts = []
    calls = BatchingPool("x", list, 1, 1, lambda work, result: counts.append(calls.asked), counts.append)
    calls.submit(1)
    idle(calls)
    assert counts == [1]
    calls.close()


def test_what_waits_can_be_dropped(gate, heard):
    calls = BatchingPool("x", gate, 1, 2, heard.result, heard.error)
    calls.submit("first")
    gate.wait_for(1)
    for work in range(5):
        calls.submit(work)
    calls.cancel_pending()
    assert calls.asked == 1
    gate.open.set()
    heard.wait_for(results=1)
    idle(calls)
    calls.submit("later")
    heard.wait_for(results=2)
    assert [work for work, _ in heard.results] == ["first", "later"]
    calls.close()


def test_all_threads_end_whatever_waits_and_however_much_each_takes(heard):
    for batch_size, waiting in ((1, 20), (4, 20), (1, 0), (4, 0)):
        calls = BatchingPool("ending", list, 6, batch_size, heard.result, heard.error)
        for work in range(waiting):
            calls.submit(work)
        calls.close()
        calls.cancel_pending()
        if waiting:
            calls.submit("later")
        calls.join()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ending-")]
    assert "later" not in dict(heard.results)


def test_after_close_nothing_is_taken_up_and_no_answer_counts(gate, heard):
    """An answer that comes then may be that of a model which was told to give up."""
    calls = BatchingPool("closing", gate, 2, 1, heard.result, heard.error)
    for work in range(5):
        calls.submit(work)
    gate.wait_for(2)
    calls.close()
    gate.open.set()
    calls.join()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("closing-")]
    assert (heard.results, heard.errors) == ([], [])
    assert len(gate.batches) == 2


def test_a_call_that_does_not_return_is_waited_for_so_long_and_no_longer(gate, heard):
    calls = BatchingPool("stuck", gate, 3, 1, heard.result, heard.error)
    for work in range(3):
        calls.submit(work)
    gate.wait_for(3)
    calls.close()
    began = time.monotonic()
    calls.join(patience=0.2)
    assert 0.2 <= time.monotonic() - began < 0.5 * PATIENCE
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("stuck-")]) == 3
    gate.open.set()
    calls.join()


def test_after_join_no_thread_holds_the_model(heard):
    """The last reference to a model in this process must not be dropped by a thread that outlives the main one."""

    class Model:
        def __call__(self, works):
            return works

    for _ in range(20):
        model = Model()
        gone = weakref.ref(model)
        calls = BatchingPool("held", model, 4, 1, heard.result, heard.error)
        calls.submit(1)
        calls.close()
        calls.join()
        del calls, model
        assert gone() is None


def test_what_takes_a_while_is_said_and_a_second_interrupt_waits_no_longer(heard, monkeypatch, capsys):
    gate, at_exit = Gate(), []
    calls = BatchingPool("test", gate, 1, 1, heard.result, heard.error)
    calls.close()
    wait_for(calls)  # without a call under way there is nothing to say
    assert capsys.readouterr().err == ""
    calls = BatchingPool("test", gate, 1, 1, heard.result, heard.error)
    calls.submit(1)
    gate.wait_for(1)
    calls.close()
    monkeypatch.setattr(rflow_jax.utils.worker_pool, "AT_ONCE", 0.01)
    monkeypatch.setattr(atexit, "register", lambda *what: at_exit.append(what))
    right = calls.join

    def interrupted(patience=None):
        if patience is None:
            raise KeyboardInterrupt
        return right(patience)

    monkeypatch.setattr(calls, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wait_for(calls)
    assert capsys.readouterr().err == "finishing the batch under way; Ctrl-C again to stop now\n"
    assert at_exit == [(os._exit, 130)]
    gate.open.set()
    assert right()
