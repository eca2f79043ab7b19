"""The curves of a report against their definition, and how they are drawn."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.report.charts import NARROW, SMALL, WIDE, Series, chart, ticks
from rflow_jax.report.curves import OVERALL, UNTAGGED, curve, duration, names, numbers_of_images, tags
from rflow_jax.report.runs import Picture, Prompt, SearchRun
from rflow_jax.verifiers.base import Verdict


def picture(verdict: Verdict | None) -> Picture:
    return Picture("midimg/x.png", (8, 8), 0, 0, "noise", verdict=verdict)


def a_run(*prompts: tuple[str | None, list[Verdict | None]]) -> SearchRun:
    made = (Prompt(f"{k:05d}", "p", tag, tuple(map(picture, verdicts))) for k, (tag, verdicts) in enumerate(prompts))
    return SearchRun(Path("run"), {}, {}, tuple(made), 0)


# Few values, so that ties are common.
scores = st.none() | st.integers(-3, 3).map(float) | st.just(float("nan"))
scored = st.lists(scores.map(Verdict), min_size=1, max_size=9)
decided = st.lists(st.builds(Verdict, scores, st.sampled_from(["yes", "no"])), min_size=1, max_size=9)


def best_of(verdicts: list[Verdict]) -> Verdict | None:
    """The rule in words: yes before no, yes by higher score, no by lower, unscored last, ties to the first."""
    known = [v for v in verdicts if v.score is not None and v.score == v.score]
    yes, no = [v for v in known if v.label != "no"], [v for v in known if v.label == "no"]
    if yes:
        return next(v for v in yes if v.score == max(w.score for w in yes))
    return next((v for v in no if v.score == min(w.score for w in no)), None)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), scored), min_size=1, max_size=6))
def test_a_curve_is_the_mean_of_the_best_so_far(prompts):
    run = a_run(*prompts)
    numbers = numbers_of_images([run])
    for tag in ("a", "b", OVERALL):
        chosen = [verdicts for own, verdicts in prompts if tag in (own, OVERALL)]
        found = curve(run, tag, numbers)
        for n, value in zip(numbers, found.values, strict=True):
            best = [v.score for verdicts in chosen if (v := best_of(verdicts[:n]))]
            reached = any(len(verdicts) >= n for verdicts in chosen)
            assert value == (pytest.approx(sum(best) / len(best)) if best and reached else None)
        assert found.images == sum(map(len, chosen))
        assert found.unscored == sum(best_of([v]) is None for verdicts in chosen for v in verdicts)


@given(st.lists(st.tuples(st.just("a"), decided), min_size=1, max_size=6))
def test_for_yes_and_no_a_curve_is_the_share_of_prompts_with_a_yes(prompts):
    run = a_run(*prompts)
    most = max(len(verdicts) for _, verdicts in prompts)
    best = [v.label == "yes" for _, verdicts in prompts if (v := best_of(verdicts))]
    assert run.decides
    assert curve(run, OVERALL, [most]).values == ((sum(best) / len(best)) if best else None,)


@given(scored | decided, st.integers(1, 9))
def test_the_best_is_the_first_of_equals(verdicts, count):
    [prompt] = a_run(("a", verdicts)).prompts
    best = prompt.best(count)
    wanted = best_of(verdicts[:count])
    assert (best is None) == (wanted is None)
    assert best is None or verdicts[best] is wanted


@pytest.mark.parametrize(("most", "wanted"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (32, [1, 2, 4, 8, 16, 32])])
def test_numbers_of_images(most, wanted):
    assert numbers_of_images([a_run(("a", [None] * most))]) == wanted


def test_tags_are_genevals_first_and_none_without_any():
    run = a_run(*((tag, [None]) for tag in ("mine", "colors", None, "single_object")))
    assert tags([run]) == ["single_object", "colors", "mine", UNTAGGED]
    assert curve(run, UNTAGGED, [1]).prompts == 1
    assert tags([a_run((None, [None]))]) == []


@given(st.lists(st.floats(-1e6, 1e6), max_size=8), st.integers(2, 6))
def test_ticks_enclose_the_values(values, about):
    found = ticks(values, about)
    assert 2 <= len(found) <= 2 * about + 2
    steps = [b - a for a, b in pairwise(found)]
    unseen = 1e-6 * steps[0]
    assert all(found[0] - unseen <= v <= found[-1] + unseen for v in values)
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert steps[0] > 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_ticks_of_shares_stay_between_none_and_all(values):
    assert all(0 <= tick <= 1 for tick in ticks(values, 4, decides=True))


@given(
    st.lists(st.lists(st.none() | st.floats(0, 10), min_size=6, max_size=6), min_size=1, max_size=6),
    st.sampled_from([WIDE, NARROW, SMALL]),
)
def test_labels_of_curves_do_not_touch_and_curves_stay_inside(curves, style):
    series = [Series(k, f"a run with a long name {k}", tuple(values)) for k, values in enumerate(curves)]
    found = chart("x", [1, 2, 4, 8, 16, 32], series, [v for c in curves for v in c if v is not None], style)
    for line in found.lines:
        assert all(found.left <= x <= found.right and found.top <= y <= found.bottom for x, y in line.points)
    heights = [label.y for label in found.labels if label.beside]
    assert all(b - a >= style.line - 0.2 for a, b in pairwise(heights))
    for n, tick in zip([1, 2, 4, 8, 16, 32], found.x_ticks, strict=False):
        assert style is SMALL or tick.text == str(n)


def test_names_tell_runs_apart():
    runs = [SearchRun(Path(name), {}, {}, (), 0) for name in ("/x/one", "/x/a/geneval", "/x/b/geneval")]
    assert names(runs) == ["one", "a/geneval", "b/geneval"]
    assert names(runs[1:2]) == ["geneval"]
    assert len(names([runs[0], runs[0]])) == 2


@pytest.mark.parametrize(
    ("seconds", "words"), [(42.4, "42 s"), (59.7, "1 min"), (3599.0, "1 h 00 min"), (11100.0, "3 h 05 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
