"""Qwen2.5-VL's image processing: resized to whole units and cut into patches on the host, normalised on the device.

The device gets bytes, and one of a patch's two frames: an eighth of the output of Transformers' processor, with the
same numbers in the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.layout import Grid
from rflow_jax.tokenizers.qwen import QwenTokenizer, expand_images, question
from rflow_jax.typing import Array, Float, UInt8
from rflow_jax.utils.batching import require_fitting
from rflow_jax.utils.images import decoded, levels_in
from rflow_jax.utils.json_files import naming, read_object
from rflow_jax.vlm.qwen_batching import QwenSample

_FILE = "preprocessor config"
MAX_RATIO = 200  # of the sides of a picture
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageProcessorConfig:
    """The preparation of a picture, in the names of ``preprocessor_config.json``.

    Attributes:
        min_pixels, max_pixels: pixels of the picture that is cut into patches.
        image_mean, image_std: of each channel, or one number for all.
        temporal_patch_size: frames of a patch; a picture's frames are all the same.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: float | tuple[float, ...] = CLIP_MEAN
    image_std: float | tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> ImageProcessorConfig:
        """From the content of ``preprocessor_config.json``.

        Raises:
            InputError: a step is switched off, or a number cannot be used.
        """
        steps = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
        if off := [step for step in steps if not config.get(step, True)]:
            raise InputError(f"{_FILE}: {', '.join(off)} is false, which is not supported")
        size = config.get("size") or {}
        if not isinstance(size, Mapping):
            raise InputError(f"{_FILE}: size is {size!r}; expected shortest_edge and longest_edge, in pixels of area")
        limits = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        known = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key) is not None}
        known = {key: value for key, value in limits.items() if value is not None} | known
        for key in ("image_mean", "image_std"):
            if isinstance(known.get(key), list):
                known[key] = tuple(known[key])
        _require_usable({field.name: field.default for field in fields(cls)} | known)
        return cls(**known)

    @property
    def levels(self) -> np.ndarray:
        """float32 [256, 3]: the normalised value of each level of each channel."""
        return levels_in(vars(self), _FILE)

    @property
    def factor(self) -> int:
        """Pixels a side of a unit, which becomes one token."""
        return self.patch_size * self.merge_size


def _require_usable(rules: Mapping[str, Any]) -> None:
    for name in ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels"):
        if type(value := rules[name]) is not int or value < 1:
            raise InputError(f"{_FILE}: {name} is {value!r}; expected a whole number above 0")
    if rules["min_pixels"] > rules["max_pixels"]:
        raise InputError(f"{_FILE}: min_pixels is {rules['min_pixels']}, more than max_pixels, {rules['max_pixels']}")
    if type(rules["resample"]) is bool or rules["resample"] not in [known.value for known in Image.Resampling]:
        raise InputError(f"{_FILE}: resample is {rules['resample']!r}; expected the number of a filter of Pillow")
    levels_in(rules, _FILE)


def fit_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, *, least: int = 0
) -> tuple[int, int]:
    """Height and width in multiples of ``factor``, near the picture's shape, with a number of pixels within limits.

    Source: ``smart_resize`` of the processor of Transformers; with ``least = factor`` that of Qwen's own utilities.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(f"a picture of {width} x {height} pixels: one side may be at most {MAX_RATIO} times the other")
    fitted = tuple(max(least, round(side / factor) * factor) for side in (height, width))
    if math.prod(fitted) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return _sides(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if math.prod(fitted) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return _sides(math.ceil(side * grow / factor) * factor for side in (height, width))
    return _sides(fitted)


def _sides(sides: Any) -> tuple[int, int]:
    height, width = sides
    return height, width


def limited(image: Image.Image, max_pixels: int, factor: int = 28) -> Image.Image:
    """The picture within ``max_pixels``, as Qwen's own utilities hand it to the processor."""
    image = image.convert("RGB")
    height, width = fit_size(image.height, image.width, factor, 4 * factor**2, max_pixels, least=factor)
    return image.resize((width, height))


def fitted(image: Image.Image, rules: ImageProcessorConfig) -> UInt8[np.ndarray, "y x 3"]:
    """The picture's pixels, resized to whole units."""
    image = image.convert("RGB")
    height, width = fit_size(image.height, image.width, rules.factor, rules.min_pixels, rules.max_pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling(rules.resample))
    return np.asarray(image)


def patches_of(
    pixels: UInt8[np.ndarray, "y x 3"], rules: ImageProcessorConfig
) -> tuple[UInt8[np.ndarray, "p f"], Grid]:
    """Patches of one frame, unit by unit, each channel by channel; and the grid they come from."""
    side, merge = rules.patch_size, rules.merge_size
    rows, columns = (length // side for length in pixels.shape[:2])
    units = pixels.reshape(rows // merge, merge, side, columns // merge, merge, side, 3)
    return units.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1), (1, rows, columns)


def normalised(patches: UInt8[Array, "b p f"], rules: ImageProcessorConfig) -> Float[Array, "b p g"]:
    """Patches of all frames as the network takes them, float32; on the device."""
    levels = jnp.asarray(rules.levels)
    channels = levels.shape[1]
    pixels = patches.reshape(*patches.shape[:2], channels, 1, -1)
    x = levels[pixels, jnp.arange(channels)[:, None, None]]
    frames = jnp.broadcast_to(x, (*x.shape[:3], rules.temporal_patch_size, x.shape[-1]))
    return frames.reshape(*patches.shape[:2], -1)


@dataclass(frozen=True)
class QwenProcessor:
    """Turns chats into samples.

    Attributes:
        context: maximum tokens of a sample.
        max_pixels: of a picture, applied before the processor's own limits; None: only those.
    """

    tokenizer: QwenTokenizer
    rules: ImageProcessorConfig
    config: Qwen25VLConfig
    context: int
    max_pixels: int | None = None

    def sample(self, parts: Sequence[str | Image.Image], instructions: str | None = None) -> QwenSample:
        """A user's message of texts and pictures, up to where the answer begins.

        Raises:
            InputError: a picture cannot be decoded, a text contains special tokens of pictures, or the chat is longer
                than the context.
        """
        pictures = tuple(self.picture(part) for part in parts if isinstance(part, Image.Image))
        messages = question(*(part if isinstance(part, str) else None for part in parts), system=instructions)
        tokens = [grid[1] * grid[2] // self.config.vision.unit for _, grid in pictures]
        ids = self.tokenizer.encode(expand_images(self.tokenizer.chat(messages), tokens))
        require_fitting(len(ids), self.context)
        return QwenSample(ids, pictures)

    def picture(self, image: Image.Image) -> tuple[np.ndarray, Grid]:
        """Patches and grid of a picture; raises InputError if it cannot be decoded."""
        image = decoded(image)
        if self.max_pixels is not None:
            image = limited(image, self.max_pixels, self.rules.factor)
        return patches_of(fitted(image, self.rules), self.rules)


def read_image_processor_config(folder: Path, config: Qwen25VLConfig) -> ImageProcessorConfig:
    """The rules in a model folder's ``preprocessor_config.json``, or ``processor_config.json`` (Transformers 5).

    Raises:
        InputError: there is none, it cannot be used, or its patches do not fit the vision tower.
    """
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.is_file() or not whole.is_file():
        content = read_object(path)
    else:
        path = whole
        content = read_object(whole).get("image_processor") or {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: image_processor is {content!r}; expected an object with keys")
    with naming(path):
        rules = ImageProcessorConfig.from_json(content)
    for name, want in (
        ("patch_size", config.vision.patch_size),
        ("merge_size", config.vision.spatial_merge_size),
        ("temporal_patch_size", config.vision.temporal_patch_size),
    ):
        if getattr(rules, name) != want:
            raise InputError(f"{path}: {name} is {getattr(rules, name)}, the vision tower has {want}")
    return rules
