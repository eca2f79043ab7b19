"""Memory of tensors: used again once it is free, and never while someone has it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rflow_jax.weights.buffers import Arena, new_buffer, use_arena

MIB = 2**20


def _within(array, arena):
    return np.shares_memory(array, arena._memory)


def test_memory_is_used_again_when_the_last_view_is_gone():
    arena = Arena(4 * MIB)
    first = arena.take(3 * MIB)
    view = first.view(np.uint16).reshape(3, -1)[1:]
    del first
    assert not _within(arena.take(2 * MIB), arena)  # a view still has it
    kept = arena.take(MIB)
    del view
    again = arena.take(2 * MIB + 1)
    assert _within(kept, arena)
    assert _within(again, arena)
    assert not np.shares_memory(kept, again)
    del kept, again
    assert _within(arena.take(4 * MIB), arena)  # the pieces are whole again


def test_what_is_small_or_too_large_has_memory_of_its_own():
    arena = Arena(2 * MIB)
    assert not _within(arena.take(MIB - 1), arena)
    assert not _within(arena.take(3 * MIB), arena)
    assert new_buffer(2 * MIB).nbytes == 2 * MIB


def test_threads_never_share_a_piece():
    arena = Arena(8 * MIB)

    def write(number):
        mine = new_buffer(MIB + number)
        mine[:] = number
        return bool((mine == number).all())

    with ThreadPoolExecutor(4, initializer=use_arena, initargs=(arena,)) as pool:
        assert all(pool.map(write, range(1, 100)))
    assert _within(arena.take(8 * MIB), arena)
