"""What becomes of a record."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import SUBSETS, Record, RecordError
from rflow_jax.data.transforms import LONGEST_RATIO, draw_drops, make_example, pictures
from rflow_jax.errors import InputError
from rflow_jax.utils import images

CONFIG = DataConfig("nowhere", target_size=32, condition_size=16)
KEPT = replace(CONFIG, drop_text_prob=0.0, drop_image_prob=0.0, drop_reflection_prob=0.0)


def encoded(width: int, height: int, seed: int = 0, mode: str = "RGB") -> bytes:
    """A picture whose neighbouring pixels are alike, so that resampling is told from noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    buffer = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(buffer, "TIFF")
    return buffer.getvalue()


def record(good: bytes, bad: bytes, subset: str = "rule", reflection: str = "make it blue") -> Record:
    return Record("k", subset, "a cat", reflection, good, bad)


def by_the_book(good: bytes, bad: bytes, left: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The transforms one after the other, each as its own call of Pillow."""
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in (good, bad)]
    images[1] = images[1].resize(images[0].size, Image.Resampling.BICUBIC)
    width, height = images[0].size
    size = (32, int(32 * height / width)) if width <= height else (int(32 * width / height), 32)
    images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
    images = [image.crop((left, top, left + 32, top + 32)) for image in images]
    images[1] = images[1].resize((16, 16), Image.Resampling.BICUBIC)
    return np.asarray(images[0]), np.asarray(images[1])


@pytest.mark.parametrize(
    ("good", "bad", "box"),
    [
        ((32, 32), (32, 32), (0, 0)),
        ((50, 100), (70, 70), (0, 16)),
        ((99, 60), (33, 20), (10, 0)),
        ((8, 8), (4, 4), (0, 0)),
    ],
)
def test_pixels_are_those_of_pillow(good, bad, box):
    one = encoded(*good), encoded(*bad, seed=1)
    for ours, theirs in zip(pictures(record(*one), CONFIG), by_the_book(*one, *box), strict=True):
        assert ours.dtype == np.uint8
        assert np.abs(ours.astype(int) - theirs).max() <= 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), small=st.integers(1, 60), seed=st.integers(0, 99), black_and_white=st.booleans())
def test_the_condition_is_pillows_to_one_step_even_of_noise(data, small, seed, black_and_white):
    """Also where it is a whole part of the picture, for which something faster than Pillow is used."""
    side = data.draw(st.one_of(st.integers(1, 6).map(lambda ratio: ratio * small), st.integers(2, 200)))
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    image = Image.fromarray(np.where(pixels > 127, 255, 0).astype(np.uint8) if black_and_white else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    config = replace(CONFIG, target_size=side, condition_size=small)
    good, bad = pictures(record(buffer.getvalue(), buffer.getvalue()), config)
    np.testing.assert_array_equal(good, np.asarray(image))
    want = np.asarray(image.resize((small, small), Image.Resampling.BICUBIC))
    assert np.abs(bad.astype(int) - want).max() <= 1


@given(down=st.floats(0, 1, exclude_max=True), right=st.floats(0, 1, exclude_max=True))
def test_both_pictures_are_cut_alike(down, right):
    content = encoded(64, 48)
    good, bad = pictures(record(content, content), replace(CONFIG, condition_size=32), down, right)
    np.testing.assert_array_equal(good, bad)


def test_the_crop_reaches_every_edge():
    content = encoded(64, 32)
    whole = np.asarray(Image.open(io.BytesIO(content)))
    lefts = set()
    for number in range(400):
        good = make_example(record(content, content), KEPT, seed=0, number=number).good
        lefts |= {left for left in range(33) if np.array_equal(whole[:, left : left + 32], good)}
    assert lefts == set(range(33))


def test_a_sample_is_the_same_each_time_and_differs_from_the_next():
    one = record(encoded(64, 40), encoded(64, 40, seed=1))
    first, again, other = (make_example(one, CONFIG, 3, number) for number in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.good, other.good)


def test_drops_come_as_often_as_told_and_apart_from_each_other():
    drops = np.asarray([draw_drops(CONFIG, 0, number, "rule", "long enough") for number in range(20000)])
    text, image, reflection = drops.T
    assert text.mean() == pytest.approx(0.1, abs=0.01)
    assert image.mean() == pytest.approx(0.1, abs=0.01)
    assert reflection.mean() == pytest.approx(0.19, abs=0.01)  # a black condition takes the reflection along
    assert reflection[image].all()
    assert (text & image).mean() == pytest.approx(0.01, abs=0.004)


def test_what_is_dropped():
    always = replace(CONFIG, drop_text_prob=1.0, drop_image_prob=1.0)
    one = record(encoded(32, 32), encoded(32, 32, seed=1))
    example = make_example(one, always, 0, 0)
    assert (example.prompt, example.t5_text) == ("a cat", "")
    assert not example.bad.any()
    assert example.good.any()
    assert make_example(one, KEPT, 0, 0).t5_text == "a cat [Reflexion] make it blue"
    assert make_example(one, replace(KEPT, drop_image_prob=1.0), 0, 0).t5_text == "a cat"
    assert make_example(one._replace(reflection=" bad  "), KEPT, 0, 0).t5_text == "a cat"
    edited = make_example(one._replace(subset="editing"), always, 0, 0)
    assert edited.bad.any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_any_mode_become_rgb(mode):
    good, bad = pictures(record(encoded(32, 32, mode=mode), encoded(20, 32, mode=mode)), CONFIG)
    assert good.shape == (32, 32, 3)
    assert bad.shape == (16, 16, 3)


@pytest.mark.parametrize("content", [b"", b"no picture", encoded(32, 32)[:60]])
def test_a_corrupt_picture_is_named(content):
    with pytest.raises(RecordError, match="k: bad_image cannot be decoded"):
        make_example(record(encoded(32, 32), content), CONFIG, 0, 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"target_size": 0}, "data.target_size is 0"),
        ({"drop_text_prob": 1.5}, "data.drop_text_prob is 1.5"),
        ({"workers": -1}, "data.workers is -1"),
        ({"split_ratios": {"generel": [1.0, 1.0]}}, "did you mean general"),
    ],
)
def test_what_cannot_be_is_refused(wrong, words):
    with pytest.raises(InputError, match=words):
        replace(CONFIG, **wrong)


def test_sizes_are_whole_tokens():
    CONFIG.require_grid(16)
    with pytest.raises(InputError, match="multiple of 12"):
        CONFIG.require_grid(12)


def test_only_editing_keeps_its_condition_always():
    for subset in SUBSETS:
        images = [draw_drops(CONFIG, 0, number, subset, "long enough").image for number in range(300)]
        assert any(images) == (subset != "editing")


def strip(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(8, 4000), (4000, 8), (4, 33)])
def test_a_strip_is_told_by_its_header_alone(size, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(RecordError, match=rf"k: good_image .*\({size[0]}x{size[1]}: an edge is over {LONGEST_RATIO:g}"):
        pictures(record(strip(*size), strip(8, 8)), CONFIG)


def test_the_longest_strip_is_cut_as_any_other():
    assert pictures(record(strip(4, 4 * int(LONGEST_RATIO)), strip(8, 8)), CONFIG)[0].shape == (32, 32, 3)


def test_what_memory_does_not_hold_is_a_bad_record(monkeypatch):
    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", fail)
        with pytest.raises(RecordError, match="k: not enough memory"):
            pictures(record(strip(50, 40), strip(50, 40)), CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", fail)
        with pytest.raises(RecordError, match=r"good_image cannot be decoded \(not enough memory\)"):
            pictures(record(strip(8, 8), strip(8, 8)), CONFIG)
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    with pytest.raises(RecordError, match=r"good_image cannot be decoded \(8x8 pixels; 10 are read at most\)"):
        pictures(record(strip(8, 8), strip(8, 8)), CONFIG)
