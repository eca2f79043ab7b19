"""The decisions of a search, over any scores."""

import math
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.search.chains import Sample, best_first, chains, last_round, next_parents
from rflow_jax.verifiers.base import Verdict

scores = st.one_of(st.none(), st.sampled_from([0.0, 3.0, 7.5, 10.0, math.nan]), st.floats(0, 10))


def sample(number: int, branch: int, score: float | None, parent: int | None = None) -> Sample:
    return Sample(number, branch, (0, 0, number, branch), f"{number}-{branch}.png", parent, verdict=Verdict(score))


@st.composite
def searches(draw: st.DrawFn) -> tuple[list[Sample], int]:
    """A whole search: noise images, then rounds of corrections of the chosen parents."""
    noise_rounds, noise_branch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    branches = draw(st.integers(1, noise_rounds * noise_branch))
    samples = [sample(r, b, draw(scores)) for r in range(noise_rounds) for b in range(noise_branch)]
    for number in range(noise_rounds, noise_rounds + draw(st.integers(1, 4))):
        parents = next_parents(samples, branches)
        samples += [sample(number, b, draw(scores), parent) for b, parent in enumerate(parents)]
    return samples, branches


@given(st.lists(scores, min_size=1, max_size=8))
def test_best_first_is_a_permutation_by_score_then_order_with_unscored_last(values):
    samples = [sample(0, branch, value) for branch, value in enumerate(values)]
    ranked = best_first(samples, [*range(len(samples)), 0])
    assert sorted(ranked) == list(range(len(samples)))
    keys = [(samples[p].verdict.scored, samples[p].verdict.score if samples[p].verdict.scored else 0) for p in ranked]
    assert keys == sorted(keys, reverse=True)
    for earlier, later in pairwise(ranked):
        if samples[earlier].rank == samples[later].rank:
            assert earlier < later


@given(searches())
def test_each_round_corrects_distinct_images_of_the_round_before(search):
    samples, branches = search
    for number in {s.round for s in samples if s.parent is not None}:
        parents = [s.parent for s in samples if s.round == number]
        assert len(set(parents)) == len(parents) == branches
        if any(samples[p].parent is not None for p in parents):
            assert {samples[p].round for p in parents} == {number - 1}


@given(searches())
def test_the_kept_parents_are_no_worse_than_those_left_out(search):
    samples, branches = search
    noise = [p for p, s in enumerate(samples) if s.parent is None]
    kept = [s.parent for s in samples if s.parent in noise]
    assert len(kept) == branches
    assert all(samples[k].rank >= samples[n].rank for k in kept for n in noise if n not in kept)


@given(searches())
def test_chains_begin_at_a_noise_image_and_a_child_joins_its_parents_chain(search):
    samples, branches = search
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
    samples, _ = search
    for k, chain in enumerate(chains(samples)):
        assert [samples[p].branch for p in chain[1:]] == [k] * (len(chain) - 1)
    assert [samples[p].branch for p in last_round(samples)] == list(range(len(last_round(samples))))


@given(searches())
def test_a_noise_image_can_be_the_best_of_its_chain_and_of_all(search):
    samples, _ = search
    best = replace(samples[0], verdict=Verdict(100.0))
    raised = [best, *samples[1:]]
    assert best_first(raised, range(len(raised)))[0] == 0
    for chain in chains(raised):
        if chain[0] == 0:
            assert best_first(raised, chain)[0] == 0


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
