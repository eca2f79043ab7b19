"""Prompts about shapes: their wording, GenEval's metadata, and what is held out."""

import json
from collections import Counter
from hashlib import sha256
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rflow_jax.errors import InputError
from rflow_jax.shapes.grammar import (
    INVERSE,
    TAGS,
    Prompt,
    Wanted,
    all_contents,
    from_metadata,
    held_out_prompts,
    is_held_out,
    parse,
    sample_prompt,
)

CONTENTS = [prompt for tag in TAGS for prompt in all_contents(tag)]
RED_STAR, BLUE_RING = Wanted("star", "red"), Wanted("ring", "blue")


def weaker(prompt):
    """The prompts that this one implies, without single objects, and without shapes alone if it says more of them."""
    colored = bool(prompt.wanted[0].color)
    if prompt.relation:
        yield Prompt(prompt.wanted[::-1], INVERSE[prompt.relation])
        if colored:
            yield Prompt(prompt.wanted)
            yield Prompt(tuple(Wanted(one.shape) for one in prompt.wanted), prompt.relation)
    for number in range(1, len(prompt.wanted)):
        yield from map(Prompt, combinations(prompt.wanted, number))


def test_every_content_has_its_text_and_its_metadata():
    rng = Random(0)
    for prompt in CONTENTS:
        wording = rng.choice(prompt.wordings())
        assert wording.canonical() == prompt == prompt.canonical()
        assert parse(wording.text) == wording
        assert from_metadata(wording.metadata) == wording
    assert len({prompt.text for prompt in CONTENTS}) == len(CONTENTS)


def test_counts_of_contents():
    assert Counter(prompt.tag for prompt in CONTENTS) == {
        "single_object": 8, "two_object": 84, "counting": 32, "colors": 64, "position": 6384, "color_attr": 20384,
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        '{"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"}',
        '{"tag": "two_object", "include": [{"class": "star", "count": 1}, {"class": "ring", "count": 1}], '
        '"prompt": "a photo of a star and a ring"}',
        '{"tag": "counting", "include": [{"class": "cross", "count": 2}], "exclude": [{"class": "cross", "count": 3}], '
        '"prompt": "a photo of two crosses"}',
        '{"tag": "colors", "include": [{"class": "star", "count": 1, "color": "orange"}], '
        '"prompt": "a photo of an orange star"}',
        '{"tag": "position", "include": [{"class": "ring", "count": 1}, {"class": "star", "count": 1, '
        '"position": ["left of", 0]}], "prompt": "a photo of a star left of a ring"}',
        '{"tag": "color_attr", "include": [{"class": "star", "count": 1, "color": "red"}, {"class": "ring", '
        '"count": 1, "color": "blue"}], "prompt": "a photo of a red star and a blue ring"}',
    ],
)
def test_metadata_are_those_of_geneval(line):
    metadata = json.loads(line)
    assert from_metadata(metadata).metadata == metadata
    assert parse(metadata["prompt"]).metadata == metadata


def test_three_objects_and_colored_positions():
    green_cross = Wanted("cross", "green")
    assert Prompt((RED_STAR, BLUE_RING, green_cross)).text == "a photo of a red star, a blue ring and a green cross"
    assert Prompt((RED_STAR, BLUE_RING), "above").text == "a photo of a red star above a blue ring"


@pytest.mark.parametrize(
    "text", ["A star and a ring.", "a photo of a star and a ring", " a  photo of a star and a ring\n"]
)
def test_texts_as_users_type_them(text):
    assert parse(text) == Prompt((Wanted("star"), Wanted("ring")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a photo of a red dog and a big star", "unknown words: dog, big. Shapes: circle, "),
        ("a photo of a star of a ring", "not understood; expected such as"),
        ("a star and a red ring", "a color for some objects only; expected such as"),
        ("a star and a star", "a shape or a color twice"),
        ("a red star and a red ring", "a shape or a color twice"),
        ("a star left of a ring left of a moon", "'left of' among 3 objects"),
        ("a star, a ring, a moon and a heart", "4 objects"),
        ("three red stars", "not understood"),
        ("", "not understood"),
    ],
)
def test_what_is_no_prompt(text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"tag": "colors"},
        {"exclude": [{"class": "star", "count": 4}]},
        {"include": [{"class": "dog", "count": 1}]},
        {"include": []},
        {"include": [{"class": "star", "count": 1, "position": ["left of", 0]}]},
        {"include": [{"count": 1}]},
        {"include": None},
    ],
)
def test_metadata_of_other_prompts_are_refused(change):
    with pytest.raises(InputError):
        from_metadata(Prompt((Wanted("star"),)).metadata | change)


def test_nothing_that_training_uses_implies_a_held_out_prompt():
    rng = Random(0)
    training = [prompt for prompt in CONTENTS if not is_held_out(prompt)]
    for prompt in rng.sample(training, 1500):
        assert not any(map(is_held_out, prompt.wordings()))
        assert not any(map(is_held_out, weaker(prompt)))
    shares = {tag: sum(p.tag == tag for p in training) / sum(p.tag == tag for p in CONTENTS) for tag in TAGS}
    assert shares.pop("single_object") == 1
    assert all(0.15 < share < 0.8 for share in shares.values()), shares


@given(st.randoms(use_true_random=False))
def test_training_draws_no_held_out_prompt(rng):
    assert not is_held_out(sample_prompt(rng))


def test_training_draws_every_tag():
    rng = Random(0)
    counts = Counter(sample_prompt(rng).tag for _ in range(1000))
    assert min(counts[tag] for tag in TAGS) > 50


def test_the_benchmark_is_fixed():
    prompts = held_out_prompts()
    texts = [prompt.text for prompt in prompts]
    assert len(set(texts)) == 240
    assert sha256("\n".join(texts).encode()).hexdigest()[:16] == "0fdc64a06b7b9dab"
    assert Counter(prompt.tag for prompt in prompts) == {
        "single_object": 8, "two_object": 70, "counting": 8, "colors": 16, "position": 69, "color_attr": 69,
    }  # fmt: skip
    assert all(is_held_out(prompt) or prompt.tag == "single_object" for prompt in prompts)
    assert held_out_prompts(50) == prompts[:50]
    assert held_out_prompts(50, seed=1) != prompts[:50]


def test_more_held_out_prompts_than_there_are():
    assert len({prompt.text for prompt in held_out_prompts(2000)}) == 2000
    for count in (0, -1, 10**6):
        with pytest.raises(InputError, match="held-out prompts were asked for"):
            held_out_prompts(count)
