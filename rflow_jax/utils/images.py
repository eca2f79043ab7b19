"""Images on the host: reading, resizing and normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rflow_jax.errors import InputError

_CHANNELS = 3
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # one channel of up to 16 bits, as Pillow opens it
_DEEPEST, _TO_8_BITS = 65535, 257  # 65535 / 257 is 255


def fit_to_grid(image: Image.Image, grid: int) -> Image.Image:
    """RGB, with both sides cut down to multiples of ``grid`` pixels by resizing (Lanczos), as diffusers does."""
    width, height = (max(grid, side - side % grid) for side in image.size)
    image = decoded(image)
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
    """An image in RGB, fully decoded; 16 bits a channel are scaled to 8.

    Raises:
        InputError: it cannot be decoded, or its levels have no known range.
    """
    try:
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
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and errors of its own
        raise InputError(f"the image cannot be decoded ({_reason(error)})") from error


def image_in(content: bytes) -> Image.Image:
    """An image in RGB from the bytes of its file, rotated by its EXIF data; raises InputError if it is unreadable."""
    return _read(BytesIO(content))


def read_image(path: Path) -> Image.Image:
    """An image in RGB, rotated by its EXIF data; raises InputError if it is unreadable."""
    try:
        return _read(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(source: Path | BytesIO) -> Image.Image:
    try:
        with Image.open(source) as file:
            return _upright(decoded(file))
    except InputError:
        raise
    except UnidentifiedImageError as error:  # for bytes, the error only names a memory address
        raise InputError("cannot read this image (not an image file)") from error
    except Exception as error:
        raise InputError(f"cannot read this image ({_reason(error)})") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # invalid EXIF; the image itself is intact
        return image


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
