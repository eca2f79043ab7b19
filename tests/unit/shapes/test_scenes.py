"""Scenes that meet their prompts, scenes that fail them, and the edits between the two."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.errors import InputError
from rflow_jax.shapes.edits import Edit, reflection, repair, spoil
from rflow_jax.shapes.grammar import COLORS, SHAPES, parse, sample_prompt
from rflow_jax.shapes.scenes import SIZE, THING, Item, Scene, detections, is_clear, judge_scene, make_scene
from rflow_jax.verifiers.findings import KEEP

LIGHT = (240.0, 240.0, 240.0)
seeds = st.integers(0, 2**32)
anything = st.builds(
    Item,
    st.sampled_from([*SHAPES, THING]),
    st.sampled_from(list(COLORS)),
    st.floats(0, SIZE),
    st.floats(0, SIZE),
    st.floats(4, 50),
)
anywhere = st.builds(Scene, st.lists(anything, max_size=8).map(tuple), st.just(LIGHT))


def row(*nouns):
    """A scene with these items from left to right."""
    items = [Item(*reversed(noun.split()), 14.0 + 22 * i, 48.0, 10.5) for i, noun in enumerate(nouns)]
    return Scene(tuple(items), LIGHT)


def nouns_of(scene):
    return Counter(item.noun for item in scene.items)


@given(seeds)
def test_a_scene_is_what_its_prompt_asks_for(seed):
    rng = Random(seed)
    prompt = sample_prompt(rng)
    scene = make_scene(prompt, rng)
    assert judge_scene(prompt, scene).correct
    assert judge_scene(prompt.metadata, scene).correct
    assert is_clear(scene)
    assert len(scene.items) == sum(wanted.count for wanted in prompt.wanted)
    assert min(scene.background) > 200


@given(seeds)
def test_a_spoiled_scene_fails_and_its_repair_does_not(seed):
    rng = Random(seed)
    prompt = sample_prompt(rng)
    scene = make_scene(prompt, rng)
    spoiled = spoil(scene, prompt, rng)
    assert not judge_scene(prompt, spoiled).correct
    assert is_clear(spoiled)
    edits, repaired = repair(prompt, spoiled, rng)
    assert edits
    assert judge_scene(prompt, repaired).correct
    assert repaired.background == scene.background
    changed = sum(item not in repaired.items for item in spoiled.items)
    assert changed <= sum(edit.count for edit in edits if edit.action != "add") * 2  # an exchange moves two
    text = reflection(edits)
    assert text.count(".") in (1, 2)
    assert text != KEEP


def test_what_cannot_be_spoiled():
    with pytest.raises(InputError, match="can be spoiled"):
        spoil(row("red thing"), parse("a star"), Random(0))


def test_the_same_seed_gives_the_same_scenes():
    def triple(seed):
        rng = Random(seed)
        prompt = sample_prompt(rng)
        scene = make_scene(prompt, rng)
        spoiled = spoil(scene, prompt, rng)
        return prompt, scene, spoiled, repair(prompt, spoiled)

    assert [triple(seed) for seed in range(40)] == [triple(seed) for seed in range(40)]


@given(seeds, anywhere)
def test_any_scene_at_all_can_be_judged_and_repaired(seed, scene):
    prompt = sample_prompt(Random(seed))
    correct = judge_scene(prompt, scene).correct
    edits, repaired = repair(prompt, scene)
    assert (not edits) == correct == (repaired == scene)
    assert correct or all(item.shape != THING for item in repaired.items)
    assert judge_scene(prompt, repaired).correct or not is_clear(repaired)


@pytest.mark.parametrize(
    ("text", "nouns", "orders"),
    [
        ("a photo of a blue star", ["red star"], "Make the red star blue."),
        ("a photo of a blue cross", ["green ring"], "Replace the green ring with a blue cross."),
        ("a photo of four stars", ["red star", "blue star"], "Add two stars."),
        ("a photo of two rings", ["red ring", "blue ring", "red ring"], "Remove one ring."),
        ("a photo of two rings", ["red moon", "red moon"], "Replace two red moons with rings."),
        ("a photo of a star right of a ring", ["red star", "red ring"], "Move the star right of the ring."),
        ("a photo of a star left of a ring", ["red ring", "red star"], "Move the ring right of the star."),  # has room
        ("a photo of a star and a ring", ["red ring"], "Add a star."),
        ("a photo of a star and a ring", ["red ring", "red star", "blue moon"], KEEP),
        ("a photo of a star and a ring", ["red ring", "red star", "blue thing"], KEEP),
        ("a photo of a star and a ring", ["red ring", "red thing"], "Replace the red thing with a star."),
        (
            "a photo of two rings",
            ["red ring", "red thing", "red ring", "red ring"],
            "Remove one ring. Remove one red thing.",
        ),
        (
            "a photo of a red star and a blue ring",
            ["blue star", "red ring"],
            "Make the blue star red. Make the red ring blue.",
        ),
        (
            "a photo of a red star, a blue ring and a black moon",
            ["blue star", "red ring", "red moon"],
            "Make the blue star red. Make the red ring blue.",
        ),
        (
            "a photo of a red star right of a blue ring",
            ["blue star", "blue ring"],
            "Make the blue star red. Move the red star right of the blue ring.",
        ),
    ],
)
def test_edits_in_words(text, nouns, orders):
    prompt = parse(text)
    edits, repaired = repair(prompt, row(*nouns))
    assert reflection(edits) == orders
    assert judge_scene(prompt, repaired).correct


def test_what_the_edits_do_not_name_keeps_its_place():
    before = row("green moon", "blue star", "red ring")
    _, after = repair(parse("a photo of a blue star, a red ring and a pink moon"), before)
    assert after.items[1:] == before.items[1:]
    moon = after.items[0]
    assert replace(moon, color="green", jitter=(0.0, 0.0, 0.0)) == before.items[0]


def test_the_largest_of_a_shape_is_the_one_that_counts():
    scene = row("red star", "blue star")
    assert not judge_scene(parse("a red star"), scene).correct  # of equal ones the last
    larger = replace(scene, items=(replace(scene.items[0], half_size=12.0), scene.items[1]))
    assert judge_scene(parse("a red star"), larger).correct
    edits, _ = repair(parse("a blue star"), larger)
    assert edits == (Edit("color", "red star", "blue"),)


def test_detections_have_the_boxes_that_are_drawn():
    (found,) = detections(row("red triangle"))["triangle"]
    assert found.box == pytest.approx((3.5, 38.55, 24.5, 57.45))
    assert found.mask == "red"
