"""How verdicts are compared: plain ones by their own rank, those of an ensemble by rank aggregation."""

import json
import math
import re
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.search.prompt_folder import json_line
from rflow_jax.verifiers.base import EnsembleVerdict, MemberVerdict, Verdict, read_verdict
from rflow_jax.verifiers.ranking import best_first, with_ensemble_scores

few = st.sampled_from([0.0, 1.0, 2.0, 3.0])
plain = st.builds(Verdict, st.one_of(st.none(), few, st.just(math.nan)), st.sampled_from([None, "yes", "no"]))
scored = st.builds(Verdict, few, st.sampled_from([None, "yes", "no"]))
weights = st.lists(st.sampled_from([0.1, 0.2, 0.3, 1.0, 2.5]), min_size=1, max_size=4)


def ensemble(verdicts, by):
    members = tuple(
        MemberVerdict(f"m{k}", weight, verdict) for k, (verdict, weight) in enumerate(zip(verdicts, by, strict=True))
    )
    return EnsembleVerdict(None, members=members)


@st.composite
def sets(draw, verdict=plain, least=1):
    """What each member says of each image, and the members' weights.

    No verdicts of an ensemble yet: what checks our annotations draws at random itself.
    """
    by = draw(weights)
    rows = draw(st.lists(st.lists(verdict, min_size=len(by), max_size=len(by)), min_size=least, max_size=7))
    return rows, by


def ensembles(drawn):
    rows, by = drawn
    return [ensemble(row, by) for row in rows]


def verdict_of(image, member):
    return image.members[member].verdict


def with_verdict(image, member, verdict):
    members = list(image.members)
    members[member] = replace(members[member], verdict=verdict)
    return replace(image, members=tuple(members))


@given(st.lists(st.one_of(st.none(), plain), max_size=8))
def test_plain_verdicts_go_by_their_own_rank_and_stay_as_they_are(found):
    ranks = [verdict.rank if verdict else (0, 0.0) for verdict in found]
    assert best_first(found) == sorted(range(len(found)), key=lambda k: ranks[k], reverse=True)
    assert all(new is old for new, old in zip(with_ensemble_scores(found), found, strict=True))


@given(st.lists(plain, min_size=1, max_size=8), st.sampled_from([0.3, 1.0, 7.0]))
def test_an_ensemble_of_one_is_its_member(found, weight):
    assert best_first([ensemble([verdict], [weight]) for verdict in found]) == best_first(found)


@given(sets(), st.randoms())
def test_the_order_of_the_images_changes_no_place(drawn, random):
    """Permuted, everyone keeps its score, and the order is the same but for ties."""
    images = ensembles(drawn)
    places = list(range(len(images)))
    random.shuffle(places)
    before, after = with_ensemble_scores(images), with_ensemble_scores([images[k] for k in places])
    assert after == [before[k] for k in places]
    order = best_first([images[k] for k in places])
    assert [before[places[k]].score for k in order] == [before[k].score for k in best_first(images)]


@given(sets())
def test_equals_keep_their_order_and_the_unscored_are_last(drawn):
    images = ensembles(drawn)
    order, scores = best_first(images), [verdict.score for verdict in with_ensemble_scores(images)]
    for earlier, later in pairwise(order):
        if scores[earlier] is None:
            assert scores[later] is None
        if scores[earlier] == scores[later]:
            assert earlier < later
        elif scores[later] is not None:
            assert scores[earlier] > scores[later]
    assert [score is None for score in scores] == [not image.scored for image in images]
    assert all(score is None or 0 < score < 1 for score in scores)


def dominates(one, other):
    """Scored by the same members, by none ranked below, and by one above."""
    pairs = [(a.verdict, b.verdict) for a, b in zip(one.members, other.members, strict=True)]
    if any(a.scored != b.scored for a, b in pairs):
        return False
    return all(a.rank >= b.rank for a, b in pairs) and any(a.rank > b.rank for a, b in pairs)


@given(sets(least=2))
def test_a_dominated_image_never_wins_over_its_dominator(drawn):
    images = ensembles(drawn)
    place = {k: at for at, k in enumerate(best_first(images))}
    for k, one in enumerate(images):
        for n, other in enumerate(images):
            if dominates(one, other):
                assert place[k] < place[n]


@given(sets(scored, least=2), st.data())
def test_an_image_that_one_member_likes_more_is_before_its_former_self(drawn, data):
    images = ensembles(drawn)
    k = data.draw(st.integers(0, len(images) - 1))
    member = data.draw(st.integers(0, len(images[k].members) - 1))
    better = with_verdict(images[k], member, Verdict(99.0, "yes"))
    at = data.draw(st.integers(0, len(images)))
    together = [*images[:at], better, *images[at:]]
    order = best_first(together)
    former = k if k < at else k + 1
    assert dominates(better, together[former])
    assert order.index(at) < order.index(former)


@given(sets(least=2), st.tuples(scored, scored), st.data())
def test_a_better_score_never_makes_a_place_worse(drawn, two, data):
    images = ensembles(drawn)
    k = data.draw(st.integers(0, len(images) - 1))
    member = data.draw(st.integers(0, len(images[k].members) - 1))
    places = []
    for verdict in sorted(two, key=lambda verdict: verdict.rank):
        changed = [*images[:k], with_verdict(images[k], member, verdict), *images[k + 1 :]]
        places.append(best_first(changed).index(k))
    assert places[1] <= places[0]


@given(sets(scored), st.data())
def test_scores_count_by_their_order_alone(drawn, data):
    """A member's scale does not matter."""
    images = ensembles(drawn)
    member = data.draw(st.integers(0, len(images[0].members) - 1))
    stretched = [
        with_verdict(
            image, member, replace(verdict_of(image, member), score=verdict_of(image, member).score ** 3 * 1e6)
        )
        for image in images
    ]
    assert best_first(stretched) == best_first(images)


def scores(*columns, by=None):
    """Images, by what each member says of them."""
    rows = zip(
        *[[Verdict(None if value is None else float(value)) for value in column] for column in columns], strict=True
    )
    return [ensemble(row, by or [1.0] * len(columns)) for row in rows]


def test_the_weighted_mean_of_ranks_decides():
    assert best_first(scores([3, 2, 1], [1, 3, 2])) == [1, 0, 2]
    assert best_first(scores([3, 2, 1], [1, 3, 2], by=[3.0, 1.0])) == [0, 1, 2]
    assert [verdict.score for verdict in with_ensemble_scores(scores([3, 2, 2, 1]))] == [7 / 8, 1 / 2, 1 / 2, 1 / 8]


def test_equal_means_are_equal_whatever_numbers_the_weights_are():
    """0.1 + 0.2 is not 0.3 in floating point; the first of equals would be lost."""
    assert best_first(scores([1, 2], [1, 2], [2, 1], by=[0.1, 0.2, 0.3])) == [0, 1]
    assert best_first(scores([2, 1], [2, 1], [1, 2], by=[0.1, 0.2, 0.3])) == [0, 1]


def test_a_member_that_failed_for_an_image_puts_it_in_its_middle():
    found = [verdict.score for verdict in with_ensemble_scores(scores([9, 8, 7], [1, None, 2]))]
    assert found == pytest.approx([(5 / 6 + 1 / 4) / 2, (1 / 2 + 1 / 2) / 2, (1 / 6 + 3 / 4) / 2], rel=1e-12)
    # Neither helped: by the other member alone it would be before one that both like ...
    assert best_first(scores([4, 3, 2, 1], [None, 3, 2, 1])) == [1, 0, 2, 3]
    # ... nor harmed: as the last of that member's it would be no better than the others.
    assert best_first(scores([1, 3, 2], [3, None, 1])) == [1, 0, 2]
    assert (
        with_ensemble_scores(scores([1, 3, 2], [3, 0, 1]))[1].score
        == with_ensemble_scores(scores([1, 3, 2], [3, 0, 1]))[0].score
    )


def test_a_member_that_scored_nothing_does_not_count():
    assert best_first(scores([1, 3, 2], [None, None, None])) == [1, 2, 0]


def test_images_without_any_verdict_are_last():
    images = [None, *scores([None, 2], [None, 1]), Verdict(None, error="gone")]
    assert best_first(images) == [2, 0, 1, 3]
    assert [verdict and verdict.score for verdict in with_ensemble_scores(images)] == [None, None, 1 / 2, None]


@given(sets())
def test_verdicts_are_read_again_from_what_is_stored(drawn):
    images = ensembles(drawn)
    for image in with_ensemble_scores(images):
        back = read_verdict(json.loads(json_line(asdict(image))))
        # A number that JSON has not is stored as null: neither is a score.
        assert repr(back) == re.sub(r"score=(nan|inf|-inf)", "score=None", repr(image))


def test_what_is_no_verdict():
    for stored in ({"scores": 1}, {"score": 1.0, "members": [{"name": "x"}]}, {"score": 1.0, "members": [3]}):
        with pytest.raises((KeyError, TypeError)):
            read_verdict(stored)


def test_the_reflector_is_told_what_every_member_found():
    members = (MemberVerdict("a", 1.0, Verdict(3.0, explanation="no owl")), MemberVerdict("b", 1.0, Verdict(None)))
    told = EnsembleVerdict(None, explanation="a: Overall: 3\nno owl", members=members)
    assert told.evaluation() == "a: Overall: 3\nno owl"
    assert EnsembleVerdict(None, members=members[1:]).evaluation() == "No evaluation of this image is available."


def test_a_cycle_is_no_matter():
    """Condorcet's paradox: each is preferred to another by most; by mean ranks they are equal."""
    order = best_first(scores([3, 2, 1], [1, 3, 2], [2, 1, 3]))
    assert order == [0, 1, 2]
    assert {verdict.score for verdict in with_ensemble_scores(scores([3, 2, 1], [1, 3, 2], [2, 1, 3]))} == {0.5}
