"""Programs that threads start beside each other: a first run is alone, later ones take turns."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rflow_jax.parallel import programs
from rflow_jax.parallel.programs import SharedProgram, shared_jit, turn


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    programs._started.clear()


def test_equals_jit_with_static_and_donated_arguments(on_gpu):
    @shared_jit(static_argnums=0, static_argnames="shift", donate_argnums=1)
    def scaled(factor, x, *, shift=0):
        """Doc."""
        return factor * x + shift

    for _ in range(2):
        np.testing.assert_array_equal(scaled(3, jnp.ones(4), shift=2), np.full(4, 5.0))
    assert (scaled.__name__, scaled.__doc__) == ("scaled", "Doc.")
    assert "multiply" in scaled.lower(3, jnp.ones(4)).as_text()


def test_a_first_run_has_the_devices_alone(on_gpu):
    """While one thread runs a program for the first time nothing else starts, and what was started has ended."""
    log, begun = [], threading.Event()

    class Running(SharedProgram):
        def __init__(self, name, seconds):
            super().__init__(lambda x: x + 1)
            run = self._jitted

            def jitted(x):
                log.append(("begins", name, x.shape))
                begun.set()
                time.sleep(seconds)
                log.append(("ends", name, x.shape))
                return run(x)

            self._jitted = jitted

    slow, quick = Running("slow", 0.2), Running("quick", 0)
    quick(jnp.ones(2))
    begun.clear(), log.clear()
    thread = threading.Thread(target=slow, args=(jnp.ones(3),))
    thread.start()
    begun.wait()
    quick(jnp.ones(2))
    thread.join()
    assert [(what, name) for what, name, _ in log] == [
        ("begins", "slow"),
        ("ends", "slow"),
        ("begins", "quick"),
        ("ends", "quick"),
    ]


def test_waits_for_what_was_started_before_a_first_run(on_gpu):
    waited = []

    class Output:
        """In place of an array that a device still computes."""

        def block_until_ready(self):
            waited.append(self)
            raise RuntimeError("the error of another thread")

    programs._started.append(Output())
    program = SharedProgram(jnp.negative)
    program(jnp.ones(2))
    assert len(waited) == 1
    assert not programs._started


def test_only_the_smallest_output_is_kept(on_gpu):
    program = SharedProgram(lambda x: (jnp.tile(x, 1000), x.sum()))
    for _ in range(3):
        _, total = program(jnp.ones(7))
        jax.block_until_ready(total)
    assert [one.size for one in programs._started] == [1, 1]  # the first run was waited for


def test_nests_within_a_turn(on_gpu):
    with turn():
        assert float(SharedProgram(jnp.sum)(jnp.ones(3))) == 3


def test_other_devices_need_no_turns():
    program = SharedProgram(jnp.sum)
    program(jnp.ones(3))
    assert not program._known
