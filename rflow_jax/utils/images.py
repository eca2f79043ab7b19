"""Images on the host: reading, resizing and normalisation.

Every picture of a user is decoded here, by one set of rules, whatever reads it: files of six formats only, up to a
number of bytes and of pixels; the first frame; turned as its EXIF data say; RGB, with 16 bits scaled to 8 and without
transparency, which is dropped and not composited.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from rflow_jax.errors import InputError
from rflow_jax.utils.files import is_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # of Pillow's many, one of which starts Ghostscript
MAX_PIXELS = 2**27  # 400 MB in RGB
MAX_BYTES = 2**30  # of a file
_DAMAGED = "the image cannot be decoded"
_CHANNELS = 3
_TURNS: dict[Any, Image.Transpose] = {  # orientation in EXIF -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_PNG = b"\x89PNG\r\n\x1a\n"
_BESIDE = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that may be large and say nothing about its levels
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # one channel of up to 16 bits, as Pillow opens it
_DEEPEST, _TO_8_BITS = 65535, 257  # 65535 / 257 is 255
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit is MAX_PIXELS


class PictureError(InputError):
    """A picture that cannot be read; ``reason`` says why in a few words."""

    def __init__(self, reason: str, what: str = "cannot read this image") -> None:
        super().__init__(f"{what} ({reason})")
        self.reason = reason


def fit_to_grid(image: Image.Image, grid: int) -> Image.Image:
    """RGB, with both sides cut down to multiples of ``grid`` pixels by resizing (Lanczos), as diffusers does."""
    image = decoded(image)
    width, height = (max(grid, side - side % grid) for side in image.size)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def condition_pixels(image: Image.Image, size: int) -> np.ndarray:
    """The condition as the network gets it: uint8 [size, size, 3], resized bicubically."""
    return np.asarray(decoded(image).resize((size, size), Image.Resampling.BICUBIC))


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file; the same bytes are stored and sent."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images in a row, scaled to the height of the highest."""
    height = max(image.height for image in images)
    scaled = [image.resize((image.width * height // image.height, height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled), height))
    left = 0
    for image in scaled:
        row.paste(image, (left, 0))
        left += image.width
    return row


def pixel_levels(mean: Sequence[float], std: Sequence[float], scale: float = 1 / 255) -> np.ndarray:
    """float32 [256, 3]: the normalised value of each level of each channel, rounded as Transformers rounds."""
    levels = (np.arange(256) * scale).astype(np.float32)[:, None]
    return (levels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def levels_in(content: Mapping[str, Any], source: str) -> np.ndarray:
    """The :func:`pixel_levels` of a ``preprocessor_config.json`` of Transformers, for three channels.

    Raises:
        InputError: it lacks them, or skips a step; begins with ``source``.
    """
    if not (content.get("do_rescale", True) and content.get("do_normalize", True)):
        raise InputError(f"{source}: do_rescale and do_normalize must be true")
    try:
        mean, std = (np.asarray(content[key], np.float32) for key in ("image_mean", "image_std"))
        if not {mean.shape, std.shape} <= {(), (_CHANNELS,)}:
            raise ValueError("not a number, nor one for each channel")
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError("not numbers to divide by")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source}: image_mean and image_std are needed, three numbers each, those of image_std above 0"
        ) from error
    scale = content.get("rescale_factor", 1 / 255)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise InputError(f"{source}: rescale_factor is {scale!r}; expected a number above 0")
    mean, std = (np.broadcast_to(numbers, _CHANNELS).tolist() for numbers in (mean, std))
    return pixel_levels(mean, std, scale)


def decoded(image: Image.Image) -> Image.Image:
    """An image in RGB, fully decoded and turned as its EXIF data say; 16 bits a channel are scaled to 8.

    Raises:
        PictureError: it cannot be decoded, or its levels have no known range.
    """
    try:
        return _upright(_rgb(image), image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and errors of its own
        raise PictureError(_reason(error), _DAMAGED) from error


def image_in(content: bytes, longest_ratio: float = math.inf) -> Image.Image:
    """An image in RGB from the bytes of its file, turned as its EXIF data say.

    Args:
        longest_ratio: longer to shorter edge; beyond it the image is not decoded.

    Raises:
        PictureError: it is of none of the formats, damaged, too large or too elongated.
    """
    try:
        return _read(content, longest_ratio)
    except PictureError:
        # What stands beside a picture is no reason to refuse it, though Pillow does beyond some size.
        if (bare := _without_texts(content)) is None:
            raise
        return _read(bare, longest_ratio)


def read_image(path: Path) -> Image.Image:
    """An image in RGB, as :func:`image_in` reads it; raises InputError if it is unreadable."""
    try:
        return image_in(picture_bytes(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read this image ({_reason(error)})") from error


def picture_bytes(path: Path) -> bytes:
    """The content of a picture's file.

    Raises:
        PictureError: not a regular file, or too large.
        OSError: it cannot be read.
    """
    found = os.stat(path)  # before it is opened, which would wait at a pipe
    if not stat.S_ISREG(found.st_mode):
        raise PictureError("not a file" if not stat.S_ISDIR(found.st_mode) else "a folder")
    if found.st_size > MAX_BYTES:
        raise PictureError(f"{found.st_size:,} bytes; {MAX_BYTES:,} are read at most")
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def size_in(source: Path | bytes) -> tuple[int, int]:
    """Width and height as the header has them; raises PictureError if there is none that can be read."""
    with _opened(source) as image:
        return image.size


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An open picture within the limits; all that Pillow raises while it is open becomes a PictureError."""
    if isinstance(source, bytes) and len(source) > MAX_BYTES:
        raise PictureError(f"{len(source):,} bytes; {MAX_BYTES:,} are read at most")
    if isinstance(source, Path) and not is_file(source):
        raise PictureError("no such file")
    what = "cannot read this image"
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"{image.width}x{image.height} pixels; {MAX_PIXELS:,} are read at most")
            what = _DAMAGED
            yield image
    except PictureError:
        raise
    except UnidentifiedImageError as error:  # for bytes, the error only names a memory address
        raise PictureError("not a PNG, JPEG, WebP, GIF, TIFF or BMP file") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"too many pixels; {MAX_PIXELS:,} are read at most") from error
    except Exception as error:  # Pillow's decoders raise errors of many kinds, struct.error among them
        raise PictureError(_reason(error), what) from error


def _read(content: bytes, longest_ratio: float) -> Image.Image:
    with _opened(content) as image:
        width, height = image.size
        if max(width, height) > longest_ratio * min(width, height):
            raise PictureError(f"{width}x{height}: an edge is over {longest_ratio:g} times the other")
        if image.mode != "RGB":
            return _upright(_rgb(image), image)
        image.load()
        return _upright(image, image)


def _rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB; raises Pillow's errors, and ValueError for levels without a known range."""
    if image.mode in _DEEP:  # Pillow's own conversion would clip all levels above 255
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > _DEEPEST:
            raise ValueError(f"levels from {levels.min()} to {levels.max()}; save it with 8 or 16 bits")
        grey = Image.fromarray(((levels + _TO_8_BITS // 2) // _TO_8_BITS).astype(np.uint8))
        grey.info = dict(image.info)
        return grey.convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point levels; save it with 8 or 16 bits")
    return image.convert("RGB")


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """The image turned as the EXIF data of its source say, and without them, so that it is not turned again."""
    try:
        method = _TURNS.get(source.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # invalid EXIF; the image itself is intact
        return image
    if method is not None:
        image = image.transpose(method)
        for name in _EXIF:
            image.info.pop(name, None)
    return image


def _without_texts(content: bytes) -> bytes | None:
    """A PNG file without its texts and its profile; None if it is none, or has none of these."""
    if not content.startswith(_PNG):
        return None
    kept, place = [_PNG], len(_PNG)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + length + 12  # with its own length, kind and checksum
        if kind not in _BESIDE:
            kept.append(content[place:end])
        place = end
    bare = b"".join(kept)
    return bare if len(bare) < len(content) else None


def _reason(error: Exception) -> str:
    """In a few words, on one line."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0].strip()
    return text[:200] or type(error).__name__
