"""The original's defects that concern decisions, one by one: its recorded search has it, ours does otherwise."""

from itertools import pairwise
from pathlib import Path

from tests.kit.search_replay import REFLECTION, SPOILS_DECISIONS, Trace, load, replay, showing, verdict, where


@showing("same_image_twice")
def test_equal_answers_select_one_image_twice_there_and_distinct_images_here(trace: Trace, tmp_path: Path):
    assert any(len({*made["selected"]}) < len(made["selected"]) for made in trace["rounds"])
    ours = replay(trace, tmp_path)
    assert all(len({*parents}) == trace["settings"]["branches"] for parents in ours.parents)


def test_equal_scores_are_selected_in_the_order_made(tmp_path: Path):
    trace = REFLECTION["gpt-equal_answers_always"]
    assert {*trace["rounds"][0]["selected"]} == {"n1.0"}
    assert {*replay(trace, tmp_path).parents[0]} == {"n1.0", "n1.1", "n2.0"}


@showing("siblings_in_one_chain")
def test_siblings_join_one_chain_there_and_here_every_chain_is_a_line_that_grows_each_round(
    trace: Trace, tmp_path: Path
):
    parent_of = {child["image"]: child["parent"] for made in trace["rounds"] for child in made["children"]}
    last = trace["rounds"][-1]["chains"]
    assert any(parent_of[child] != parent for chain in last for parent, child in pairwise(chain))
    assert len({len(chain) for chain in last}) > 1  # and so other chains starve
    ours = replay(trace, tmp_path)
    assert {len(chain) for chain in ours.chains[-1]} == {trace["settings"]["rounds"]}
    for chain in ours.chains[-1]:
        assert all(ours.parent_of[child] == parent for parent, child in pairwise(chain))


@where(lambda trace: "texts_of_another_image" in trace["shows"] and not SPOILS_DECISIONS & {*trace["shows"]})
def test_after_sorting_texts_stay_in_the_old_order_there_and_here_each_chain_keeps_its_own(
    trace: Trace, tmp_path: Path
):
    made_with = {child["image"]: child for made in trace["rounds"] for child in made["children"]}
    told = {entry["text"]: entry for made in trace["rounds"] for entry in made["refinements"]}
    ours = replay(trace, tmp_path)
    differs = False
    for child in made_with.values():
        entry = told[child["refined_prompt"]]
        own = made_with.get(child["parent"], {"refined_prompt": trace["prompt"], "reflection": ""})
        case = ours.told["reflect"][child["image"]]
        assert (case.current_prompt, case.last_reflection) == (own["refined_prompt"], own["reflection"])
        differs |= entry["current_prompt"] != case.current_prompt
    assert differs


@showing("noise_image_would_be_best")
def test_a_noise_image_is_never_the_best_of_all_there_and_here_it_counts(trace: Trace, tmp_path: Path):
    (chosen,) = trace["files"]["samples_best"].values()
    assert chosen.startswith("c")
    best = replay(trace, tmp_path, include_initial_images=True).best
    assert best.startswith("n")
    assert verdict(trace["scores"][best]).rank >= verdict(trace["scores"][chosen]).rank


@where(
    lambda trace: (
        "noise_image_would_be_best_of_its_chain" in trace["shows"] and not SPOILS_DECISIONS & {*trace["shows"]}
    )
)
def test_chains_begin_at_round_one_there_and_here_at_their_noise_image(trace: Trace, tmp_path: Path):
    theirs = trace["rounds"][-1]
    assert all(image.startswith("c") for chain in theirs["chains"] for image in chain)
    ours = replay(trace, tmp_path, include_initial_images=True)
    assert {tuple(chain[1:]) for chain in ours.chains[-1]} == {*map(tuple, theirs["chains"])}
    assert all(ours.parent_of[chain[1]] == chain[0] for chain in ours.chains[-1])
    assert any(image.startswith("n") for image in ours.best_of_chains[-1])


@showing("best_of_all_ties_by_chain")
def test_the_best_of_all_is_the_first_chains_among_equals_there_and_the_first_made_here(trace: Trace, tmp_path: Path):
    (chosen,) = trace["files"]["samples_best"].values()
    best = replay(trace, tmp_path).best
    assert best != chosen
    assert verdict(trace["scores"][best]).rank == verdict(trace["scores"][chosen]).rank
    assert int(best[1:].split(".")[0]) < int(chosen[1:].split(".")[0])


def test_answers_out_of_order_move_scores_to_other_images_there_and_here_each_keeps_its_own(tmp_path: Path):
    trace = REFLECTION["gpt-answers_out_of_order"]
    first = trace["rounds"][0]
    ranked = sorted(first["images"], key=lambda name: verdict(trace["scores"][name]).rank, reverse=True)
    assert first["evaluations"] == [trace["scores"][name] for name in ranked[:2]]
    assert first["selected"] != ranked[:2]
    ours = replay(trace, tmp_path)
    assert {*ours.parents[0]} == {*ranked[:2]}
    assert all(
        case.evaluation == verdict(trace["scores"][ours.parent_of[name]]).evaluation()
        for name, case in ours.told["reflect"].items()
    )


def test_a_lost_answer_moves_the_other_scores_there_and_here_only_its_image_is_unscored(tmp_path: Path):
    trace = REFLECTION["gpt-answer_lost_before_selection"]
    first = trace["rounds"][0]
    lost = first["scorings"][trace["settings"]["failing_scores"][0] - 1]
    assert first["evaluations"] != [trace["scores"][name] for name in first["selected"]]
    ours = replay(trace, tmp_path, unscored=lost)
    assert {*ours.parents[0]} == {*first["images"]} - {lost}


def test_a_lost_answer_kills_the_run_there_and_here_it_goes_on(tmp_path: Path):
    trace = REFLECTION["gpt-answer_lost_in_first_round"]
    assert trace["failed"].startswith("IndexError")
    assert trace["rounds"] == []
    whole = REFLECTION["gpt-answer_lost_in_later_round"]
    assert whole["scores"].items() >= trace["scores"].items()
    ours = replay(whole, tmp_path, unscored="c1.0")
    assert [len(chain) for chain in ours.chains[-1]] == [3, 3]
    assert all(best != "c1.0" for best in ours.best_of_chains[-1])


def test_a_lost_answer_leaves_a_child_in_no_chain_there_and_here_in_its_parents(tmp_path: Path):
    trace = REFLECTION["gpt-answer_lost_in_later_round"]
    scorings = [name for made in trace["rounds"] for name in made["scorings"]]
    lost = scorings[trace["settings"]["failing_scores"][0] - 1]
    made = trace["rounds"][1]
    placed = {name for chain in made["chains"] for name in chain}
    assert len({child["image"] for child in made["children"]} - placed) == 1
    ours = replay(trace, tmp_path, unscored=lost)
    assert [len(chain) for chain in ours.chains[1]] == [2, 2]
    assert all(ours.parent_of[chain[1]] == chain[0] for chain in ours.chains[1])


@where(
    lambda trace: not trace["failed"] and trace["settings"]["rounds"] > 1 and not trace["settings"]["failing_scores"]
)
def test_corrections_are_scored_twice_there_and_every_image_once_here(trace: Trace, tmp_path: Path):
    last = {child["image"] for child in trace["rounds"][-1]["children"]}
    for name, times in trace["scored_times"].items():
        assert times == (2 if name.startswith("c") and name not in last else 1)
    assert {*replay(trace, tmp_path).scored.values()} == {1}


def test_answers_out_of_order_give_prompts_to_other_branches_there():
    trace = next(trace for trace in load("noise_prompt") if "out_of_order" in trace["name"])
    first, second = trace["rounds"][:2]
    assert [entry["image"] for entry in first["refinements"]] == ["n1.0", "n1.1"]
    assert [entry["evaluation"] for entry in first["refinements"]] == [trace["scores"]["n1.1"], trace["scores"]["n1.0"]]
    assert [image["prompt"] for image in second["images"]] == ["P1.1", "P1.0"]
