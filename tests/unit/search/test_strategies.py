"""Searches as descriptions of rounds, over any scores."""

from dataclasses import dataclass, replace
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.search.lineage import Sample, best_first, chains
from rflow_jax.search.strategies import (
    Corrections,
    FreshNoise,
    GivenImages,
    PlannedImage,
    RefinedPrompts,
    Stage,
    Strategy,
    ZeroOrder,
)
from rflow_jax.verifiers.base import Verdict

sizes = st.integers(1, 4)
verdicts = st.builds(
    lambda score, label: Verdict(score, label),
    st.one_of(st.none(), st.sampled_from([0.0, 5.0, 9.0, 10.0]), st.floats(0, 10)),
    st.sampled_from([None, None, "yes", "no"]),
)
first_stages = st.one_of(
    *(st.builds(kind, sizes, sizes) for kind in (FreshNoise, ZeroOrder, RefinedPrompts)),
    st.builds(GivenImages, st.just(1), sizes),
)
rows = st.one_of(
    st.tuples(first_stages), st.tuples(first_stages, st.builds(Corrections, sizes, sizes)), st.tuples(first_stages)
)
# Made in the test, and not while its input is drawn: what checks our annotations draws at random itself.
strategies = st.fixed_dictionaries(
    {"stages": rows},
    optional={"stop_score": st.floats(5, 10), "max_images": st.integers(1, 20)},
)
answers = st.lists(verdicts, min_size=1, max_size=30)


@dataclass
class Searched:
    """What came of a strategy: its samples, and what it planned each time it was asked."""

    samples: list[Sample]
    plans: list[tuple[PlannedImage, ...]]

    def of(self, stage: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.stage == stage]


def searched(strategy: Strategy, answers: list[Verdict | None]) -> Searched:
    """Runs it to its end; the answers begin again when they are used up."""
    verdict = cycle(answers)
    samples: list[Sample] = []
    plans = []
    while drafts := strategy.plan(samples):
        plans.append(drafts)
        assert len(plans) < 50, "no end"
        for draft in drafts:
            seed = (0, 0, draft.round, draft.branch)
            name = f"{draft.round}-{draft.branch}"
            made = Sample(draft.round, draft.branch, draft.stage, seed, name, draft.parent, verdict=next(verdict))
            samples.append(made)
    return Searched(samples, plans)


def of_stages(*stages: st.SearchStrategy[Stage]) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({"stages": st.tuples(*stages)})


@given(strategies, answers)
def test_no_image_is_planned_twice_and_the_rounds_count_up(how, answers):
    strategy = Strategy(**how)
    found = searched(strategy, answers)
    places = [(sample.round, sample.branch) for sample in found.samples]
    assert len(set(places)) == len(places)
    assert places == sorted(places)
    rounds = sorted({number for number, _ in places})
    assert rounds == list(range(len(rounds)))
    for number in rounds:
        assert [branch for r, branch in places if r == number] == list(range(sum(r == number for r, _ in places)))


@given(strategies, answers)
def test_a_parent_is_made_and_judged_before_its_child_is_planned(how, answers):
    strategy = Strategy(**how)
    found = searched(strategy, answers)
    known = 0
    for drafts in found.plans:
        assert all(draft.parent is None or 0 <= draft.parent < known for draft in drafts)
        known += len(drafts)


@given(strategies, answers)
def test_it_makes_what_it_says_and_never_more_than_its_budget(how, answers):
    strategy = Strategy(**how)
    found = searched(strategy, answers)
    count = len(found.samples) - len(found.of("given"))
    assert count <= strategy.images()
    if strategy.max_images is not None:
        assert count <= strategy.max_images
    if not strategy.reached(found.samples):
        assert count == strategy.images()
    assert strategy.plan(found.samples) == ()


@given(strategies, answers)
def test_it_stops_in_the_round_in_which_an_image_is_good_enough(how, answers):
    strategy = Strategy(**how)
    found = searched(strategy, answers)
    good = [
        sample.round
        for sample in found.samples
        if strategy.stop_score is not None
        and sample.verdict.score is not None
        and sample.verdict.score >= strategy.stop_score
        and sample.verdict.label != "no"
    ]
    assert strategy.reached(found.samples) == bool(good)
    if good:
        assert min(good) == found.samples[-1].round


@pytest.mark.parametrize(
    ("verdict", "enough"),
    [
        (Verdict(9.0), True),
        (Verdict(9.5, "yes"), True),
        (Verdict(9.5, "no"), False),
        (Verdict(8.9), False),
        (Verdict(None, error="gone"), False),
        (Verdict(float("inf")), False),
        (None, False),
    ],
)
def test_what_is_good_enough(verdict, enough):
    sample = Sample(0, 0, "noise", (0, 0, 0, 0), "a.png", verdict=verdict)
    assert Strategy((FreshNoise(2, 1),), stop_score=9.0).reached([sample]) is enough


@given(of_stages(st.builds(FreshNoise, sizes, sizes), st.builds(Corrections, sizes, sizes)), answers)
def test_fresh_noise_is_planned_at_once_and_corrections_round_by_round(how, answers):
    strategy = Strategy(**how)
    found = searched(strategy, answers)
    noise, corrections = strategy.stages
    assert [len(drafts) for drafts in found.plans] == [
        noise.rounds * noise.branches, *[corrections.branches] * corrections.rounds
    ]  # fmt: skip
    careful = replace(strategy, stop_score=99.0)
    assert [len(d) for d in searched(careful, [Verdict(1.0)]).plans] == [
        *[noise.branches] * noise.rounds, *[corrections.branches] * corrections.rounds
    ]  # fmt: skip


@given(of_stages(st.builds(ZeroOrder, sizes, sizes)), answers)
def test_neighbours_lie_near_the_best_so_far(how, answers):
    strategy = Strategy(**how)
    found = searched(strategy, answers)
    (stage,) = strategy.stages
    assert [s.stage for s in found.samples] == ["noise"] * stage.branches + ["neighbour"] * stage.branches * (
        stage.rounds - 1
    )
    for position, sample in enumerate(found.samples):
        before = [p for p in range(position) if found.samples[p].round < sample.round]
        assert sample.parent == (best_first(found.samples, before)[0] if before else None)


@given(of_stages(st.builds(RefinedPrompts, sizes, sizes)), answers)
def test_each_branch_refines_its_own_image(how, answers):
    strategy = Strategy(**how)
    found = searched(strategy, answers)
    assert {sample.stage for sample in found.samples} == {"prompt"}
    for sample in found.samples:
        if sample.round == 0:
            assert sample.parent is None
        else:
            parent = found.samples[sample.parent]
            assert (parent.round, parent.branch) == (sample.round - 1, sample.branch)


@given(of_stages(st.builds(GivenImages, st.just(1), sizes), st.builds(Corrections, sizes, sizes)), answers)
def test_given_images_come_first_cost_nothing_and_are_corrected_also_where_they_are_few(how, answers):
    strategy = Strategy(**how)
    found = searched(strategy, answers)
    images, corrections = strategy.stages
    assert strategy.images() == corrections.rounds * corrections.branches
    assert [s.stage for s in found.samples[: images.branches]] == ["given"] * images.branches
    first = [s.parent for s in found.samples if s.round == 1]
    # Every image is used before one is used twice.
    assert len(set(first)) == min(images.branches, corrections.branches)
    assert len(chains(found.samples)) == corrections.branches


def test_all_given_images_are_there_whatever_the_budget():
    strategy = Strategy((GivenImages(1, 5), Corrections(3, 2)), max_images=3)
    found = searched(strategy, [Verdict(1.0)])
    assert [len(drafts) for drafts in found.plans] == [5, 2, 1]


def test_given_images_that_are_good_enough_are_not_corrected():
    strategy = Strategy((GivenImages(1, 2), Corrections(3, 2)), stop_score=9.0)
    assert [len(d) for d in searched(strategy, [Verdict(9.0)]).plans] == [2]


def test_a_budget_smaller_than_a_round_cuts_it():
    strategy = Strategy((FreshNoise(2, 3), Corrections(3, 2)), max_images=7)
    assert [len(d) for d in searched(strategy, [Verdict(1.0)]).plans] == [6, 1]
    assert [len(d) for d in searched(replace(strategy, max_images=4), [None]).plans] == [4]
