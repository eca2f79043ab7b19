"""The decisions of a search, over any scores."""

import math
from dataclasses import replace
from itertools import cycle, pairwise

from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.search.lineage import (
    Sample,
    ancestors,
    best_first,
    best_of_all,
    best_of_chains,
    chains,
    is_correction,
    last_round,
    next_parents,
)
from rflow_jax.verifiers.base import Verdict

scores = st.one_of(st.none(), st.sampled_from([0.0, 3.0, 7.5, 10.0, math.nan]), st.floats(0, 10))


def sample(number: int, branch: int, score: float | None, parent: int | None = None) -> Sample:
    stage = "noise" if parent is None else "reflect"
    seed = (0, 0, number, branch)
    return Sample(number, branch, stage, seed, f"{number}-{branch}.png", parent, verdict=Verdict(score))


@st.composite
def searches(draw: st.DrawFn) -> tuple[int, int, int, int, list[float | None]]:
    """(rounds of noise, branches of noise, branches of corrections, rounds of corrections, scores)."""
    noise_rounds, noise_branch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    branches = draw(st.integers(1, noise_rounds * noise_branch))
    return noise_rounds, noise_branch, branches, draw(st.integers(1, 4)), draw(st.lists(scores, min_size=1))


def searched(case: tuple[int, int, int, int, list[float | None]]) -> tuple[list[Sample], int]:
    """A whole search, noise images and then rounds of corrections of the chosen parents; and its branches.

    Not run while its input is drawn: what checks our annotations draws at random itself.
    """
    noise_rounds, noise_branch, branches, rounds, given_scores = case
    score = cycle(given_scores)
    samples = [sample(r, b, next(score)) for r in range(noise_rounds) for b in range(noise_branch)]
    for number in range(noise_rounds, noise_rounds + rounds):
        parents = next_parents(samples, branches)
        samples += [sample(number, b, next(score), parent) for b, parent in enumerate(parents)]
    return samples, branches


@given(st.lists(scores, min_size=1, max_size=8))
def test_best_first_is_a_permutation_by_score_then_order_with_unscored_last(values):
    samples = [sample(0, branch, value) for branch, value in enumerate(values)]
    ranked = best_first(samples, [*range(len(samples)), 0])
    assert sorted(ranked) == list(range(len(samples)))
    keys = [(samples[p].verdict.scored, samples[p].verdict.score if samples[p].verdict.scored else 0) for p in ranked]
    assert keys == sorted(keys, reverse=True)
    for earlier, later in pairwise(ranked):
        if samples[earlier].verdict.rank == samples[later].verdict.rank:
            assert earlier < later


@given(searches())
def test_each_round_corrects_distinct_images_of_the_round_before(search):
    samples, branches = searched(search)
    for number in {s.round for s in samples if s.parent is not None}:
        parents = [s.parent for s in samples if s.round == number]
        assert len(set(parents)) == len(parents) == branches
        if any(samples[p].parent is not None for p in parents):
            assert {samples[p].round for p in parents} == {number - 1}


@given(searches())
def test_the_kept_parents_are_no_worse_than_those_left_out(search):
    samples, branches = searched(search)
    noise = [p for p, s in enumerate(samples) if s.parent is None]
    kept = [s.parent for s in samples if s.parent in noise]
    assert len(kept) == branches
    assert all(samples[k].verdict.rank >= samples[n].verdict.rank for k in kept for n in noise if n not in kept)


@given(searches())
def test_chains_begin_at_a_noise_image_and_a_child_joins_its_parents_chain(search):
    samples, branches = searched(search)
    found = chains(samples)
    assert len(found) == branches
    for chain in found:
        assert samples[chain[0]].parent is None
        assert all(samples[child].parent == parent for parent, child in pairwise(chain))
        assert samples[chain[-1]].round == samples[-1].round
    members = [p for chain in found for p in chain]
    assert len(members) == len(set(members))
    assert {p for p, s in enumerate(samples) if s.parent is not None} <= set(members)


@given(searches())
def test_branch_k_of_every_round_belongs_to_chain_k(search):
    samples, _ = searched(search)
    for k, chain in enumerate(chains(samples)):
        assert [samples[p].branch for p in chain[1:]] == [k] * (len(chain) - 1)
    assert [samples[p].branch for p in last_round(samples)] == list(range(len(last_round(samples))))


@given(searches())
def test_a_noise_image_can_be_the_best_of_its_chain_and_of_all(search):
    samples, _ = searched(search)
    for first in {chain[0] for chain in chains(samples)}:
        raised = [replace(s, verdict=Verdict(100.0)) if p == first else s for p, s in enumerate(samples)]
        assert best_of_all(raised) == first
        assert {b for b, c in zip(best_of_chains(raised), chains(raised), strict=True) if c[0] == first} == {first}
        # The original's accounting leaves it out.
        assert is_correction(raised[best_of_all(raised, count_first=False)])
        assert all(is_correction(raised[best]) for best in best_of_chains(raised, count_first=False))


@given(searches())
def test_the_best_of_a_chain_is_its_own_and_no_other_of_it_is_better(search):
    samples, _ = searched(search)
    for best, chain in zip(best_of_chains(samples), chains(samples), strict=True):
        assert best in chain
        assert samples[best].verdict.rank == max(samples[position].verdict.rank for position in chain)
    assert samples[best_of_all(samples)].verdict.rank == max(sample.verdict.rank for sample in samples)


@given(searches())
def test_ancestors_are_the_chain_before_it(search):
    samples, _ = searched(search)
    for chain in chains(samples):
        for place, position in enumerate(chain):
            assert ancestors(samples, position) == chain[:place]


def test_chains_that_begin_with_one_image_grow_apart():
    samples = [sample(0, 0, 1.0)]
    for number in (1, 2):
        samples += [sample(number, b, b / 2, p) for b, p in enumerate(next_parents(samples, 2))]
    assert chains(samples) == [[0, 1, 3], [0, 2, 4]]


def test_without_corrections_there_are_no_chains_and_the_best_is_one_of_all():
    samples = [sample(0, b, score) for b, score in enumerate([1.0, 3.0, 3.0])]
    assert chains(samples) == best_of_chains(samples) == []
    assert best_of_all(samples) == best_of_all(samples, count_first=False) == 1


def test_yes_ranks_before_no_and_a_weaker_no_before_a_stronger():
    verdicts = [
        Verdict(9.0, "no"),
        Verdict(None, error="?"),
        Verdict(1.0, "yes"),
        Verdict(2.0, "no"),
        Verdict(3.0, "yes"),
    ]
    samples = [replace(sample(0, branch, 0.0), verdict=verdict) for branch, verdict in enumerate(verdicts)]
    assert best_first(samples, range(5)) == [4, 2, 3, 0, 1]
