"""Pictures of scenes, and the judge that reads them."""

from functools import partial
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from rflow_jax.errors import InputError
from rflow_jax.shapes.edits import repair, spoil
from rflow_jax.shapes.grammar import COLORS, SHAPES, parse, sample_prompt
from rflow_jax.shapes.judge import judge, read
from rflow_jax.shapes.outlines import distances, extents
from rflow_jax.shapes.render import draw, pack, render
from rflow_jax.shapes.scenes import SIZE, THING, Item, Scene, is_clear, judge_scene, make_scene

LIGHT = (236.0, 240.0, 244.0)
SCENES = 150  # of each kind


def cases():
    """Prompts, scenes, and whether these are correct."""
    rng = Random(0)
    for _ in range(SCENES):
        prompt = sample_prompt(rng)
        scene = make_scene(prompt, rng)
        yield prompt, scene, True
        yield prompt, spoil(scene, prompt, rng), False


CASES = list(cases())
PICTURES = draw(*pack([scene for _, scene, _ in CASES]))


def contents(scene):
    return sorted((item.shape, item.color) for item in scene.items)


def degraded(picture, rng, blur=0.5, noise=3.0):
    """Like an autoencoder's reconstruction of the picture."""
    blurred = ndimage.gaussian_filter(picture.astype(np.float32), (blur, blur, 0))
    return np.clip(np.round(blurred + rng.normal(0, noise, picture.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [lambda picture, rng: picture, degraded], ids=["clean", "degraded"])
def test_scenes_are_read_and_judged_as_they_are(change):
    rng = np.random.default_rng(0)
    for (prompt, scene, correct), picture in zip(CASES, PICTURES, strict=True):
        found = read(change(picture, rng))
        assert contents(found) == contents(scene)
        assert judge_scene(prompt, found).correct == correct


def test_places_sizes_and_colors_are_read():
    for (_, scene, _), picture in zip(CASES, PICTURES, strict=True):
        found = read(picture)
        np.testing.assert_allclose(found.background, scene.background, atol=0.51)
        for item in scene.items:
            nearest = min(found.items, key=lambda other, item=item: abs(other.x - item.x) + abs(other.y - item.y))
            np.testing.assert_allclose(
                (nearest.x, nearest.y, nearest.half_size), (item.x, item.y, item.half_size), atol=0.8
            )
            np.testing.assert_allclose(nearest.rgb, item.rgb, atol=4)


def test_a_scene_that_was_read_is_repaired_and_drawn_again():
    drawn = 0
    for (prompt, _, _), picture in zip(CASES, PICTURES, strict=True):
        _, repaired = repair(prompt, read(picture))
        if is_clear(repaired):
            drawn += judge(prompt, render(repaired)).correct
    assert drawn > 0.98 * len(CASES)


def test_the_renderer_is_the_same_on_devices():
    items, background = pack([scene for _, scene, _ in CASES[:16]])
    pictures = jax.jit(partial(draw, xp=jnp))(items, background)
    assert pictures.shape == (16, SIZE, SIZE, 3)
    assert np.abs(np.asarray(pictures, int) - PICTURES[:16]).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_boxes(shape):
    item = Item(shape, "black", 48.0, 48.0, 30.0)
    dark = np.asarray(render(Scene((item,), LIGHT))).mean(-1) < 220
    y, x = np.nonzero(dark)
    np.testing.assert_allclose((x.min(), y.min(), x.max() + 1, y.max() + 1), item.box, atol=1.6)
    assert max(extents(shape)) == pytest.approx(1, abs=0.15)


def test_distances_are_those_to_a_circle_and_a_square():
    table = distances()
    middle = len(table[0]) // 2
    np.testing.assert_allclose(table[SHAPES.index("circle"), middle, [0, middle, -1]], [0.35, -0.95, 0.35], atol=2e-3)
    np.testing.assert_allclose(table[SHAPES.index("square"), middle, [0, middle, -1]], [0.44, -0.86, 0.44], atol=1e-6)


def test_edges_are_smooth_and_the_rest_is_plain():
    picture = np.asarray(render(Scene((Item("circle", "red", 48.3, 48.3, 20.0),), LIGHT)), int)
    assert tuple(picture[0, 0]) == LIGHT
    assert tuple(picture[48, 48]) == COLORS["red"]
    between = (picture != picture[0, 0]).any(-1) & (picture != picture[48, 48]).any(-1)
    assert 50 < between.sum() < 250


def test_later_items_cover_earlier_ones_and_no_items_are_a_background():
    items = (Item("square", "red", 48.0, 48.0, 20.0), Item("circle", "blue", 48.0, 48.0, 8.0))
    picture = np.asarray(render(Scene(items, LIGHT)))
    assert tuple(picture[48, 48]) == COLORS["blue"]
    assert (np.asarray(render(Scene((), LIGHT))) == LIGHT).all()
    assert read(render(Scene((), LIGHT))) == Scene((), LIGHT)


def test_what_is_no_shape_is_a_thing():
    picture = Image.new("RGB", (SIZE, SIZE), (240, 240, 240))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((10, 10, 60, 16), fill=COLORS["green"])
    pen.rectangle((10, 16, 16, 50), fill=COLORS["green"])
    pen.rectangle((70, 70, 72, 72), fill=COLORS["red"])  # too small
    (item,) = read(picture).items
    assert (item.shape, item.color, item.x, item.y, item.half_size) == (THING, "green", 35.5, 30.5, 25.5)
    assert not judge(parse("a green square"), picture).correct


def test_shapes_that_touch():
    items = (Item("square", "red", 30.0, 48.0, 15.0), Item("circle", "blue", 57.2, 48.0, 15.0))
    assert contents(read(render(Scene(items, LIGHT)))) == [("circle", "blue"), ("square", "red")]
    same = (items[0], Item("circle", "red", 50.0, 48.0, 15.0))
    assert contents(read(render(Scene(same, LIGHT)))) == [(THING, "red")]


@given(st.integers(0, 2**32), st.sampled_from([0.0, 2.0, 6.0]))
def test_any_picture_can_be_read(seed, blur):
    noise = np.random.default_rng(seed).uniform(0, 255, (SIZE, SIZE, 3))
    picture = ndimage.gaussian_filter(noise, (blur, blur, 0))
    picture = (picture - picture.min()) / np.ptp(picture) * 255
    scene = read(picture.astype(np.uint8))
    repair(parse("a red star left of a blue ring"), scene)


def test_pictures_of_other_sizes():
    prompt, scene, _ = CASES[0]
    picture = render(scene)
    assert judge(prompt, picture.resize((192, 192), Image.Resampling.BICUBIC)).correct
    assert judge(prompt.metadata, picture.convert("RGBA")).correct
    with pytest.raises(InputError, match=r"a picture of uint8 \[4, 4, 3\]"):
        read(np.zeros((4, 4, 3), np.uint8))


def test_scenes_that_cannot_be_drawn():
    item = Item("circle", "red", 48.0, 48.0, 20.0)
    with pytest.raises(InputError, match="a scene of 9 items: at most 8 can be drawn"):
        pack([Scene((item,) * 9, LIGHT)])
    with pytest.raises(InputError, match="a scene with a red thing: only circle, "):
        render(Scene((Item(THING, "red", 48.0, 48.0, 20.0),), LIGHT))
