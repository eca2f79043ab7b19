"""One way of reading a picture: every mode, format and damage, by inference and by training alike."""

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from rflow_jax.data.records import RecordError
from rflow_jax.data.records import read_image as record_bytes
from rflow_jax.data.transforms import decode
from rflow_jax.errors import InputError
from rflow_jax.utils import images
from rflow_jax.utils.images import PictureError, decoded, fit_to_grid, image_in, read_image, size_in

SIZE = 7, 5
NOISE = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
DEEP = NOISE[..., 0].astype(np.uint16) * 257 + 3
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def file_of(image: Image.Image, form: str = "PNG", **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def of_mode(mode: str) -> Image.Image:
    """Noise in a mode; what it must become is Pillow's own conversion, or the levels scaled."""
    if mode in ("I;16", "I;16B"):
        return Image.frombytes(mode, SIZE, DEEP.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    if mode == "LAB":
        return Image.frombytes("LAB", SIZE, NOISE[..., :3].tobytes())
    if mode == "I":
        return Image.fromarray(DEEP.astype(np.int32))
    return Image.fromarray(NOISE).convert("RGB" if mode in ("P", "PA", "CMYK") else mode).convert(mode)


def everywhere(content: bytes, path: Path) -> list[np.ndarray]:
    """The picture as each way of reading one gives it."""
    path.write_bytes(content)
    with Image.open(io.BytesIO(content)) as opened:
        given = decoded(opened)
    found = image_in(content), read_image(path), decode(content, "k"), given, image_in(record_bytes(path, "k"))
    assert {image.mode for image in found} == {"RGB"}
    return [np.asarray(image) for image in found]


MODES = [
    ("1", "PNG"),
    ("L", "PNG"),
    ("L", "JPEG"),
    ("LA", "PNG"),
    ("P", "PNG"),
    ("P", "GIF"),
    ("P", "BMP"),
    ("PA", "TIFF"),
    ("RGB", "PNG"),
    ("RGB", "JPEG"),
    ("RGB", "WEBP"),
    ("RGB", "TIFF"),
    ("RGB", "BMP"),
    ("RGB", "GIF"),
    ("RGBA", "PNG"),
    ("RGBA", "WEBP"),
    ("RGBA", "TIFF"),
    ("I;16", "PNG"),
    ("I;16", "TIFF"),
    ("I;16B", "TIFF"),
    ("I", "TIFF"),
    ("CMYK", "JPEG"),
    ("CMYK", "TIFF"),
    ("YCbCr", "JPEG"),
    ("LAB", "TIFF"),
]


@pytest.mark.parametrize(("mode", "form"), MODES)
def test_a_picture_is_the_same_wherever_it_is_read(mode, form, tmp_path):
    lossless = {"lossless": True} if form == "WEBP" else {}
    content = file_of(of_mode(mode), form, **lossless)
    with Image.open(io.BytesIO(content)) as plain:
        if mode.startswith("I"):
            wanted = ((DEEP.astype(int) + 128) // 257)[..., None].repeat(3, -1)
        else:
            wanted = np.asarray(plain.convert("RGB"))
    for found in everywhere(content, tmp_path / "a"):
        np.testing.assert_array_equal(found, wanted)


def test_transparency_is_dropped(tmp_path):
    palette = Image.fromarray(NOISE[..., :3]).convert("P")
    clear = int(np.asarray(palette)[0, 0])
    for form in ("PNG", "GIF"):
        content = file_of(palette, form, transparency=clear)
        with Image.open(io.BytesIO(content)) as plain:
            assert "transparency" in plain.info
        for found in everywhere(content, tmp_path / "a"):
            np.testing.assert_array_equal(found, np.asarray(palette.convert("RGB")))
    for found in everywhere(file_of(Image.fromarray(NOISE)), tmp_path / "a"):
        np.testing.assert_array_equal(found, NOISE[..., :3])


def test_only_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", SIZE, color) for color in ("red", "blue", "lime")]
    for form in ("GIF", "WEBP", "TIFF", "PNG"):
        more = {"lossless": True} if form == "WEBP" else {}
        content = file_of(frames[0], form, save_all=True, append_images=frames[1:], **more)
        for found in everywhere(content, tmp_path / "a"):
            assert (found == [255, 0, 0]).all(), form


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
    9: lambda a: a,
    0: lambda a: a,
}


TURNED = {
    "PNG": ("RGB", "L", "RGBA", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "L", "RGBA", "I;16", "CMYK"),
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in TURNED.items() for mode in modes])
@pytest.mark.parametrize("orientation", TURNS)
def test_a_picture_is_turned_once(orientation, mode, form, tmp_path):
    exif = Image.Exif()
    exif[0x112] = orientation
    more = {"lossless": True} if form == "WEBP" else {}
    plain = image_in(file_of(of_mode(mode), form, **more))
    content = file_of(of_mode(mode), form, exif=exif, **more)
    wanted = TURNS[orientation](np.asarray(plain))
    for found in everywhere(content, tmp_path / "a"):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.asarray(decoded(image_in(content))), wanted)  # and not again
    with Image.open(io.BytesIO(content)) as opened:
        assert fit_to_grid(opened, 1).size == wanted.shape[1::-1]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG that says to have this size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes((3 * 7 + 1) * 5))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


RGB = Image.fromarray(NOISE[..., :3])
BROKEN_LZW = bytearray(file_of(RGB, "TIFF", compression="tiff_lzw"))
BROKEN_LZW[8:20] = b"\xff" * 12
REFUSED = {
    "nothing": (b"", "not a PNG, JPEG, WebP, GIF, TIFF or BMP file"),
    "text": (b"no picture", "not a PNG"),
    "eps": (EPS, "not a PNG"),
    "ppm": (file_of(RGB, "PPM"), "not a PNG"),
    "ico": (file_of(Image.new("RGB", (16, 16)), "ICO"), "not a PNG"),
    "pdf": (file_of(RGB, "PDF"), "not a PNG"),
    "tga": (file_of(RGB, "TGA"), "not a PNG"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
    "float": (file_of(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"), "save it with 8 or 16 bits"),
    "deeper": (file_of(Image.fromarray(DEEP.astype(np.int32) * 2), "TIFF"), "save it with 8 or 16 bits"),
    "negative": (file_of(Image.fromarray(-DEEP.astype(np.int32)), "TIFF"), "save it with 8 or 16 bits"),
    "bomb": (png(2**14, 2**13 + 1), "16384x8193 pixels; 134,217,728 are read at most"),
    "large bomb": (png(2**20, 2**20), "too many pixels"),
    "no size": (png(0, 5), "cannot read this image"),
    "cut png": (file_of(RGB)[:-40], "truncated|broken"),
    "cut jpeg": (file_of(RGB, "JPEG")[:-30], "truncated"),
    "cut webp": (file_of(RGB, "WEBP")[:-30], "cannot read"),
    "cut gif": (file_of(RGB, "GIF")[:-20], "truncated|cannot read"),
    "cut tiff": (file_of(RGB, "TIFF")[:60], "cannot read"),
    "cut bmp": (file_of(RGB, "BMP")[:-20], "truncated"),
    "broken tiff": (bytes(BROKEN_LZW), "decoder error"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_of_ours_is_one_line(name, tmp_path):
    content, words = REFUSED[name]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(PictureError, match=words) as found:
        image_in(content)
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match=words) as named:
        read_image(tmp_path / "a.png")
    assert str(named.value) == f"{tmp_path / 'a.png'}: {found.value}"
    with pytest.raises(RecordError) as skipped:
        decode(content, "k: good_image")
    assert str(skipped.value) == f"k: good_image cannot be decoded ({found.value.reason})"


def test_nothing_is_started_for_a_renamed_file(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("a process"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(InputError, match="not a PNG"):
        read_image(tmp_path / "a.png")
    with pytest.raises(PictureError, match="not a PNG"):
        size_in(tmp_path / "a.png")


def test_a_bomb_is_told_by_its_header(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("loaded"))
    for content in (png(2**20, 2**20), png(2**14, 2**14)):
        with pytest.raises(PictureError, match="at most"):
            size_in(content)
        with pytest.raises(PictureError, match="at most"):
            image_in(content)


def test_texts_beside_a_picture_do_not_matter(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 2**21, zip=True)
    texts.add_itxt("prompt", "y" * 2**21, zip=True)
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24)))
    exif = Image.Exif()
    exif[0x112] = 6
    content = file_of(RGB, pnginfo=texts, exif=exif)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"), Image.open(io.BytesIO(content)) as plain:
        plain.load()
    for found in (image_in(content), decode(content, "k")):
        np.testing.assert_array_equal(np.asarray(found), np.rot90(NOISE[..., :3], -1))
    assert image_in(png(7, 5, *[bomb] * 3)).size == SIZE
    assert image_in(png(7, 5, *[chunk(b"tEXt", b"a\0" + bytes(2**20))] * 70)).size == SIZE
    with pytest.raises(PictureError, match=r"truncated|broken"):
        image_in(file_of(RGB, pnginfo=texts)[:-30])


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_damaged_picture_is_read_or_refused(form):
    content, rng = file_of(Image.effect_noise((24, 24), 60).convert("RGB"), form), np.random.default_rng(1)
    for _ in range(150):
        bad = bytearray(content)
        for place in rng.integers(0, len(bad), rng.integers(1, 6)):
            bad[place] = rng.integers(256)
        bad = bytes(bad[: rng.integers(1, len(bad) + 1)] if rng.random() < 0.3 else bad)
        with suppress(PictureError):  # whatever else Pillow raises would come through
            assert image_in(bad).mode == "RGB"


def test_only_files_of_some_bytes_are_read(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_bytes(file_of(RGB))
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {"zero.png": "not a file", "pipe.png": "not a file", "loop.png": "symbolic links", "": "a folder"}
    for name, words in (cases | {"none.png": "No such file"}).items():
        with pytest.raises(InputError, match=words):
            read_image(tmp_path / name)
        with pytest.raises(RecordError, match=f"k: .*{words}"):
            record_bytes(tmp_path / name, "k")
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    for read in (lambda: read_image(file), lambda: image_in(file.read_bytes())):
        with pytest.raises(InputError, match="bytes; 50 are read at most"):
            read()
