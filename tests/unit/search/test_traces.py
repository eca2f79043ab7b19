"""Where the original's recorded searches are free of its defects, ours takes the same decisions."""

from pathlib import Path

import pytest

from rflow_jax.search.lineage import Sample, best_first
from tests.kit.search_replay import (
    SPOILS_DECISIONS,
    SPOILS_TEXTS,
    Trace,
    by_first,
    load,
    replay,
    showing,
    verdict,
    where,
)

FREE = where(lambda trace: not SPOILS_DECISIONS & {*trace["shows"]})
TEXTS_FREE = where(lambda trace: trace["settings"]["texts"] and not SPOILS_TEXTS & {*trace["shows"]})


@FREE
def test_the_same_images_are_selected_and_corrected_and_chains_are_the_same(trace: Trace, tmp_path: Path):
    ours = replay(trace, tmp_path)
    for made, parents, lines in zip(trace["rounds"], ours.parents, ours.chains, strict=True):
        assert sorted(parents) == sorted(made["selected"])
        assert {*map(tuple, lines)} == {*map(tuple, made["chains"])}
    assert ours.parent_of == {child["image"]: child["parent"] for made in trace["rounds"] for child in made["children"]}


@FREE
def test_the_same_images_are_placed_as_results(trace: Trace, tmp_path: Path):
    ours, files = replay(trace, tmp_path), trace["files"]
    for made, lines, best in zip(trace["rounds"], ours.chains, ours.best_of_chains, strict=True):
        assert by_first(lines, best) == by_first(made["chains"], made["best_of_chains"])
    for folder in ("samples_path_bestround", "samples_lastround"):
        assert sorted(ours.placed[folder]) == sorted(files[folder].values())
    (chosen,) = files["samples_best"].values()
    assert verdict(trace["scores"][ours.best]).rank == verdict(trace["scores"][chosen]).rank
    if "best_of_all_is_tied" not in trace["shows"]:
        assert ours.best == chosen


@TEXTS_FREE
def test_reflections_are_written_from_the_same_texts(trace: Trace, tmp_path: Path):
    told_here = replay(trace, tmp_path).told["reflect"]
    for made in trace["rounds"]:
        for child, told in zip(made["children"], made["reflections"], strict=True):
            case = told_here[child["image"]]
            assert (told["image"], told["original_prompt"]) == (child["parent"], case.prompt)
            if trace["settings"]["reflector"] == "openai":  # the other one is told the original prompt alone
                assert (told["current_prompt"], told["last_reflection"]) == (case.current_prompt, case.last_reflection)
                assert verdict(told["evaluation"]).evaluation() == case.evaluation


@TEXTS_FREE
def test_prompts_are_refined_from_the_same_texts_among_them_the_new_reflection(trace: Trace, tmp_path: Path):
    told_here = replay(trace, tmp_path).told["refine"]
    for made in trace["rounds"]:
        for child, told in zip(made["children"], made["refinements"], strict=True):
            case = told_here[child["image"]]
            assert (told["image"], told["original_prompt"]) == (child["parent"], case.prompt)
            assert (told["current_prompt"], told["reflection"]) == (case.current_prompt, case.reflection)
            if trace["settings"]["verifier"] == "gpt":  # after NVILA the original's refiner is told no evaluation
                assert verdict(told["evaluation"]).evaluation() == case.evaluation


@where(lambda trace: "nfe" in trace)
def test_the_same_image_is_the_best_of_the_first_k(trace: Trace):
    """In the order in which the original's filter reads the images: by round, then by file name."""
    samples = [
        Sample(0, branch, "noise", (0, 0, 0, branch), name, verdict=verdict(trace["scores"][name]))
        for branch, name in enumerate(trace["nfe_order"])
    ]
    for count, chosen in trace["nfe"].items():
        assert samples[best_first(samples, range(len(samples))[: int(count)])[0]].file == chosen


@showing("too_few_start_images")
def test_with_fewer_start_images_than_branches_the_first_are_corrected_again(trace: Trace, tmp_path: Path):
    ours = replay(trace, tmp_path)
    for made, lines in zip(trace["rounds"], ours.chains, strict=True):
        assert {*map(tuple, lines)} == {*map(tuple, made["chains"])}


@pytest.mark.parametrize("trace", load("noise"), ids=lambda trace: trace["name"])
def test_noise_scaling_makes_the_same_number_of_images_of_the_prompt_alone(trace: Trace, tmp_path: Path):
    ours = replay(trace, tmp_path)
    assert ours.placed["samples"] == [image["image"] for made in trace["rounds"] for image in made["images"]]
    assert all(image["prompt"] == trace["prompt"] for made in trace["rounds"] for image in made["images"])
    assert {*ours.prompts.values()} == {(None, None)}


@pytest.mark.parametrize(
    "trace", [trace for trace in load("noise_prompt") if "out_of_order" not in trace["name"]], ids=lambda t: t["name"]
)
def test_with_prompts_each_branch_goes_on_by_itself(trace: Trace, tmp_path: Path):
    ours = replay(trace, tmp_path)
    images = [image for made in trace["rounds"] for image in made["images"]]
    assert ours.placed["samples"] == trace["samples_order"] == [image["image"] for image in images]
    assert {name: refined or trace["prompt"] for name, (refined, _) in ours.prompts.items()} == {
        image["image"]: image["prompt"] for image in images
    }
    for made, following in zip(trace["rounds"], trace["rounds"][1:], strict=False):
        for told, image in zip(made["refinements"], following["images"], strict=True):
            case = ours.told["refine"][image["image"]]
            assert told["text"] == image["prompt"]
            assert (told["current_prompt"], told["reflection"] or "") == (case.current_prompt, case.reflection)
            assert told["evaluation"] in (None, trace["scores"][told["image"]])
            assert case.evaluation == verdict(trace["scores"][told["image"]]).evaluation()
