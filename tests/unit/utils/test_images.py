"""Pictures as users have them: deep ones, turned ones, and what has no place in 8 bits."""

import io

import numpy as np
import pytest
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.utils.images import condition_pixels, decoded, image_in

LEVELS = np.arange(24).reshape(4, 6) * 2849  # 0 to 65527


def file_of(image, form, **how):
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "form"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF")])
def test_sixteen_bits_are_scaled_to_eight(kind, form):
    image = image_in(file_of(Image.fromarray(LEVELS.astype(kind)), form))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.round(LEVELS / 257)[..., None].repeat(3, -1))


@pytest.mark.parametrize("levels", [LEVELS.astype(np.float32), LEVELS.astype(np.int32) * 2, -LEVELS.astype(np.int32)])
def test_levels_without_a_known_range_are_refused(levels):
    with pytest.raises(InputError, match=r"cannot be decoded \(.*save it with 8 or 16 bits\)"):
        image_in(file_of(Image.fromarray(levels), "TIFF"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_eight_bits_stay_as_they_are(mode):
    image = Image.effect_noise((9, 7), 50).convert(mode)
    assert decoded(image).tobytes() == image.convert("RGB").tobytes()


def test_a_condition_may_have_sixteen_bits():
    pixels = condition_pixels(Image.fromarray(np.full((8, 8), 257 * 90, np.uint16)), 4)
    assert (pixels == 90).all()


@pytest.mark.parametrize(
    ("kind", "form"), [*((np.uint8, form) for form in ("PNG", "JPEG", "TIFF")), (np.uint16, "PNG")]
)
def test_a_picture_is_turned_as_its_exif_data_say(kind, form):
    turned = Image.Exif()
    turned[0x112] = 6
    plain = Image.fromarray((LEVELS // (257 if kind is np.uint8 else 1)).astype(kind))
    found, before = (np.asarray(image_in(file_of(plain, form, **how)), int) for how in ({"exif": turned}, {}))
    np.testing.assert_array_equal(found, np.rot90(before, -1))


def test_what_is_no_exif_leaves_a_picture_as_it_is():
    broken = file_of(Image.new("RGB", (4, 6)), "PNG", exif=b"Exif\0\0II*\0\xff\xff")
    assert image_in(broken).size == (4, 6)
