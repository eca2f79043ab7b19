"""The parts of a prompt, as questions, and what a scene that does not meet them needs."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.shapes.edits import reflection, spoil
from rflow_jax.shapes.grammar import COLORS, SHAPES, parse, sample_prompt
from rflow_jax.shapes.requirements import remedies, requirements
from rflow_jax.shapes.scenes import SIZE, Item, Scene, judge_scene, make_scene
from rflow_jax.shapes.vocabulary import words

seeds = st.integers(0, 2**32)
anything = st.builds(
    Item, st.sampled_from(SHAPES), st.sampled_from(list(COLORS)), st.floats(0, SIZE), st.floats(0, SIZE), st.just(12.0)
)
anywhere = st.lists(anything, max_size=6).map(lambda items: Scene(tuple(items), (240.0, 240.0, 240.0)))


def test_questions_and_remedies():
    parts = requirements(parse("a red star left of a blue ring"))
    assert [(one.question, one.remedy.text, one.needs) for one in parts] == [
        ("Is there a star?", "Add a red star.", ()),
        ("Is there a ring?", "Add a blue ring.", ()),
        ("Is the star red?", "Make the star red.", (0,)),
        ("Is the ring blue?", "Make the ring blue.", (1,)),
        ("Is the star left of the ring?", "Move the red star left of the blue ring.", (0, 1)),
    ]
    assert [(one.question, one.remedy.text, one.needs) for one in requirements(parse("three rings"))] == [
        ("Are there at least three rings?", "Add a ring.", ()),
        ("Are there at most three rings?", "Remove one ring.", ()),
    ]


@given(seeds, anywhere, st.booleans())
def test_all_are_met_if_and_only_if_the_scene_is_correct(seed, scene, made):
    rng = Random(seed)
    prompt = sample_prompt(rng)
    scene = make_scene(prompt, rng) if made else scene
    answers = [judge_scene(part.metadata, scene).correct for part in requirements(prompt)]
    assert all(answers) == judge_scene(prompt, scene).correct
    assert all(answers) == (not remedies(prompt, scene))


@given(seeds)
def test_remedies_are_in_the_words_of_reflections(seed):
    rng = Random(seed)
    prompt = sample_prompt(rng)
    said = reflection(remedies(prompt, spoil(make_scene(prompt, rng), prompt, rng)))
    assert set(said.lower().replace(".", "").split()) <= set(words())


@pytest.mark.parametrize(
    ("text", "nouns", "said"),
    [
        ("a red star and a blue ring", ["red star", "green ring"], "Make the ring blue."),
        ("a red star and a blue ring", ["red star"], "Add a blue ring."),
        ("a red star left of a blue ring", ["blue ring"], "Add a red star."),
        ("a star right of a ring", ["red star", "red ring"], "Move the star right of the ring."),
        ("two stars", ["red star"], "Add a star."),
        ("two stars", ["red star"] * 3, "Remove one star."),
        ("two stars", ["red star"] * 2, "Keep everything."),
        ("a red star, a blue ring and a green moon", [], "Add a red star. Add a blue ring."),
    ],
)
def test_only_what_makes_sense_is_said(text, nouns, said):
    items = [Item(*reversed(noun.split()), 14.0 + 22 * i, 48.0, 10.5) for i, noun in enumerate(nouns)]
    assert reflection(remedies(parse(text), Scene(tuple(items), (240.0, 240.0, 240.0)))) == said
