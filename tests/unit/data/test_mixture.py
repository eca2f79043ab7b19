"""Which records are drawn."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sampling import CHUNK, MixtureSampler, SubsetSchedule
from rflow_jax.errors import InputError

COUNTS = {"general": 7, "length": 5, "rule": 11, "editing": 23}
RATIOS = {"general": [0.1, 0.3], "length": [0.1, 0.3], "rule": [0.1, 0.4], "editing": [0.7, 0.0]}


def mixture(seed=0, batch_size=8, counts=COUNTS, ratios=RATIOS, stages=(0, 50), position=None):
    return MixtureSampler(counts, ratios, list(stages), seed, batch_size, position)


@given(seed=st.integers(0, 2**70), batch_size=st.integers(1, 100), step=st.integers(0, 400))
def test_a_jump_to_any_step_draws_what_going_there_draws(seed, batch_size, step):
    going = mixture(seed, batch_size)
    numbers = range((step + 1) * batch_size)
    assert mixture(seed, batch_size).draws(step) == going.draws_of(numbers)[-batch_size:]


@given(batch_size=st.integers(1, 300), steps=st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_any_order_of_asking_gives_the_same(batch_size, steps):
    one = mixture(3, batch_size)
    assert [one.draws(step) for step in steps] == [mixture(3, batch_size).draws(step) for step in steps]


@given(step=st.integers(0, 300), further=st.integers(0, 300), batch_size=st.sampled_from([1, 8, 64]))
def test_a_position_goes_on_and_back(step, further, batch_size):
    whole = mixture(5, batch_size)
    position = json.loads(json.dumps(whole.position(step)))
    assert position["number"] == step * batch_size
    resumed = mixture(5, batch_size, position=position)
    assert resumed.draws(step + further) == whole.draws(step + further)
    assert resumed.position(step + further) == whole.position(step + further)
    assert resumed.draws(step // 2) == whole.draws(step // 2)


@given(seed=st.integers(0, 1000))
def test_each_epoch_of_a_subset_has_each_record_once(seed):
    draws = mixture(seed).draws_of(range(2000))
    for subset, count in COUNTS.items():
        mine = [(draw.epoch, draw.index) for draw in draws if draw.subset == subset]
        assert [epoch for epoch, _ in mine] == [k // count for k in range(len(mine))]
        epochs = [[index for _, index in mine[i : i + count]] for i in range(0, len(mine) // count * count, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        # Of the few orders of a small subset one may come twice.
        assert count < 11 or all(a != b for a, b in pairwise(epochs[:3])), "shuffled anew"


def test_subsets_and_seeds_are_shuffled_apart():
    counts = dict.fromkeys(SUBSETS, 100)
    ratios = {name: [1.0] for name in SUBSETS}
    orders = set()
    for seed in range(3):
        draws = mixture(seed, counts=counts, ratios=ratios, stages=[0]).draws_of(range(1000))
        for name in SUBSETS:
            orders.add(tuple(draw.index for draw in draws if draw.subset == name)[:100])
    assert len(orders) == 12


@pytest.mark.parametrize(
    ("step", "want"), [(0, (0.1, 0.1, 0.1, 0.7)), (25, (0.2, 0.2, 0.25, 0.35)), (50, (0.3, 0.3, 0.4, 0)), (999, None)]
)
def test_ratios_follow_the_stages(step, want):
    want = want or (0.3, 0.3, 0.4, 0)
    batch_size = 40000
    choice = SubsetSchedule(RATIOS, [0, 50], 1, batch_size)
    np.testing.assert_allclose(list(choice.ratios(step).values()), want, atol=1e-12)
    found = np.bincount(choice.subsets(step * batch_size, (step + 1) * batch_size), minlength=4) / batch_size
    np.testing.assert_allclose(found, want, atol=4 * 0.5 / batch_size**0.5)
    assert want[3] > 0 or found[3] == 0


def test_more_stages_and_weights_that_do_not_sum_to_one():
    choice = SubsetSchedule({"rule": [1.0, 3.0, 0.0], "editing": [3.0, 1.0, 5.0]}, [10, 20, 40], 0, 1)
    rule = [choice.ratios(step)["rule"] for step in (0, 10, 15, 20, 30, 40, 1000)]
    np.testing.assert_allclose(rule, [0.25, 0.25, 0.5, 0.75, 1.5 / 4.5, 0, 0])


def test_a_subset_without_weight_is_never_drawn():
    ratios = {name: [0.0] for name in SUBSETS} | {"general": [0.1], "rule": [0.2]}
    found = np.bincount(SubsetSchedule(ratios, [0], 0, 64).subsets(0, 10**6), minlength=4)
    assert found[1] == found[3] == 0
    assert found[0] + found[2] == 10**6


@given(start=st.integers(0, 3 * CHUNK), length=st.integers(0, 2 * CHUNK), cut=st.floats(0, 1))
def test_choices_do_not_depend_on_where_a_piece_begins(start, length, cut):
    choice, middle = SubsetSchedule(RATIOS, [0, 50], 9, 7), start + int(length * cut)
    pieces = [choice.subsets(start, middle), choice.subsets(middle, start + length)]
    np.testing.assert_array_equal(np.concatenate(pieces), choice.subsets(start, start + length))


def test_processes_partition_a_batch():
    whole = mixture().draws(9)
    parts = [mixture().draws_of(range(72 + 2 * i, 74 + 2 * i)) for i in range(4)]
    assert [draw for part in parts for draw in part] == whole


def test_numbers_that_must_not_change():
    # A checkpoint of an earlier version goes on with the same samples only if these stay.
    draws = mixture(seed=42, batch_size=4).draws(1000)
    assert [tuple(draw) for draw in draws] == [
        (4000, "general", 6, 169),
        (4001, "general", 1, 169),
        (4002, "rule", 10, 141),
        (4003, "rule", 7, 141),
    ]


def test_the_millionth_step_is_near():
    one = MixtureSampler(COUNTS, RATIOS, [0, 5000], 0, 64)
    assert one.draws(10**5)[0].number == 64 * 10**5
    assert sum(one.position(10**5)["drawn"].values()) == 64 * 10**5


@given(seed=st.integers(0, 100), subset=st.sampled_from(SUBSETS), number=st.integers(0, 100))
def test_replacements_visit_all_the_others(seed, subset, number):
    one = mixture(seed)
    draw = next(draw for draw in one.draws_of(range(number, number + 2000)) if draw.subset == subset)
    others = [one.replacement(draw, attempt) for attempt in range(COUNTS[subset] - 1)]
    assert {other.index for other in others} == set(range(COUNTS[subset])) - {draw.index}
    assert {(other.number, other.subset, other.epoch) for other in others} == {(draw.number, subset, draw.epoch)}
    assert [mixture(seed).replacement(draw, attempt) for attempt in range(3)] == others[:3]


def test_replacements_of_neighbours_differ():
    one = mixture(counts=dict.fromkeys(SUBSETS, 10000))
    found = Counter(one.replacement(draw, 0).index - draw.index for draw in one.draws_of(range(100)))
    assert max(found.values()) < 5


def test_the_only_record_has_no_replacement():
    one = mixture(counts={"rule": 1}, ratios={"rule": [1.0]}, stages=[0])
    with pytest.raises(InputError, match="rule: its only record"):
        one.replacement(one.draws(0)[0], 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratios": RATIOS | {"edit": [1.0, 1.0]}}, "unknown subset edit; did you mean editing"),
        (
            {"ratios": RATIOS | {"landscape": [1.0, 1.0]}},
            "unknown subset landscape; known are general, length",
        ),
        ({"ratios": RATIOS | {"rule": [0.1]}}, r"split_ratios.rule: 1 ratios for 2 training_stages"),
        ({"ratios": RATIOS | {"rule": [0.1, -0.1]}}, r"split_ratios.rule: \[0.1, -0.1\] must be numbers of at least 0"),
        ({"ratios": RATIOS | {"rule": [0.1, float("nan")]}}, "split_ratios.rule"),
        ({"ratios": {"rule": [1.0, 0.0], "editing": [1.0, 0.0]}}, "all are 0 at stage 2"),
        ({"ratios": {}}, "all are 0 at stage 1"),
        ({"stages": [5000, 0]}, r"training_stages \[5000, 0\]"),
        ({"stages": [0, 0]}, "training_stages"),
        ({"stages": [-1, 0]}, "training_stages"),
        ({"stages": [], "ratios": {}}, "training_stages"),
        ({"counts": COUNTS | {"rule": 0}}, "split_ratios.rule: positive, but there are no records"),
        ({"seed": -1}, "seed -1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"position": {"number": 3}}, "not one of a mixture"),
        ({"position": {"number": 3, "drawn": dict.fromkeys(SUBSETS, 1)}}, "does not add up"),
    ],
)
def test_bad_input_is_one_line(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        mixture(**changes)
    assert "\n" not in str(caught.value)
