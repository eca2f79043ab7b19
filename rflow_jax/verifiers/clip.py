"""Scores of CLIP, with images preprocessed as by CLIP's own processor, with Pillow alone."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from PIL.Image import Image, Resampling

from rflow_jax.errors import InputError
from rflow_jax.parallel.programs import shared_jit
from rflow_jax.tokenizers.flux import load_tokenizer, require_plain, special_tokens
from rflow_jax.typing import Array, Float, Int, UInt8
from rflow_jax.utils.batching import require_fitting
from rflow_jax.utils.images import levels_in
from rflow_jax.utils.json_files import read_object
from rflow_jax.verifiers.base import BATCHES_A_CALL, Verdict, score_each, unscored_number
from rflow_jax.verifiers.config import ClipVerifierConfig
from rflow_jax.weights.components import check_clip_model, load_clip_model, read_clip_config
from rflow_jax.weights.hub import resolve


@dataclass(frozen=True)
class ClipImages:
    """Resizes images and takes the center crop.

    Attributes:
        resized: pixels of the shortest side, or (height, width).
        side: pixels a side of the center crop.
        resample: the filter.
    """

    resized: int | tuple[int, int]
    side: int
    resample: Resampling = Resampling.BICUBIC

    @classmethod
    def from_json(cls, content: Mapping[str, Any], side: int, source: str) -> ClipImages:
        """From the content of ``preprocessor_config.json``.

        Args:
            side: pixels a side that the network takes.

        Raises:
            InputError: the result would have another size; begins with ``source``.
        """
        size, crop = content.get("size", side), content.get("crop_size", side)
        try:
            resized = size  # early files give a number, later ones a mapping
            if not isinstance(size, int):
                resized = size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])
            resample = Resampling(content.get("resample", Resampling.BICUBIC))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: size {size!r} or resample {content.get('resample')!r} is not known") from error
        cropped = content.get("do_center_crop", True)
        if cropped and crop not in (side, {"height": side, "width": side}):
            raise InputError(f"{source}: crop_size is {crop!r}, the network's images have {side} pixels a side")
        smallest = min(resized) if isinstance(resized, tuple) else resized
        fits = smallest >= side if cropped else resized == (side, side)
        if not fits or not content.get("do_resize", True):
            raise InputError(f"{source}: size {size!r} does not give images of {side} pixels a side")
        return cls(resized, side, resample)

    def cut(self, image: Image) -> np.ndarray:
        """An RGB image -> uint8 [side, side, 3]."""
        size = self.resized
        height, width = size if isinstance(size, tuple) else (int(size * n / min(image.size)) for n in image.size[::-1])
        pixels = np.asarray(image.resize((width, height), self.resample))
        top, left = ((length - self.side) // 2 for length in pixels.shape[:2])
        return pixels[top : top + self.side, left : left + self.side]


WANTED = ["*.json", "*.txt", "*.safetensors"]
Implementation = Literal["auto", "transformers", "own"]
# (uint8 images [b, y, x, 3], tokens [b, t]) -> scores [b]
Scores = Callable[[np.ndarray, np.ndarray], Array]


@dataclass(frozen=True)
class ClipInput:
    """One preprocessed image and its tokenized prompt."""

    pixels: np.ndarray  # uint8 [y, x, 3]
    ids: np.ndarray  # int32 [t], padded


class CLIPVerifier:
    """Scores images with CLIP.

    Raises:
        InputError: no such model, another network, or no Flax model in the Transformers that is installed.
    """

    name = "clip"
    concurrency = 1
    batches_a_call = BATCHES_A_CALL

    def __init__(self, config: ClipVerifierConfig = ClipVerifierConfig()) -> None:
        self.config = config
        self.batch_size = config.batch_size
        self._closed = threading.Event()
        folder = resolve(config.model, WANTED)
        self._sizes = read_clip_config(folder)
        path = folder / "preprocessor_config.json"
        content = read_object(path)
        self._images = ClipImages.from_json(content, self._sizes.vision.image_size, str(path))
        self._tokenizer = load_tokenizer(folder)
        self._marks = special_tokens(self._tokenizer)
        self._scores = _scores(folder, config, levels_in(content, str(path)))

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order.

        An image that cannot be decoded, a prompt beyond CLIP's 77 tokens or with special ones, and a score that is not
        a number are errors of that image alone.
        """
        return score_each(images, items, self._pair, self._verdicts, batch_size=self.batch_size, closed=self._closed)

    def close(self) -> None:
        """Cancels what a running call has not begun; those images are unscored, with ``CLOSED`` as the reason."""
        self._closed.set()

    def _pair(self, image: Image, prompt: str) -> ClipInput:
        length = self._sizes.text.max_position_embeddings
        ids = self._tokenizer(require_plain(prompt, self._marks), truncation=False, verbose=False)["input_ids"]
        require_fitting(len(ids), length)
        # Attention is causal, and the end token's vector is taken: what follows it is never seen.
        padding = [ids[-1]] * (length - len(ids))
        return ClipInput(self._images.cut(image), np.asarray([*ids, *padding], np.int32))

    def _verdicts(self, pairs: Sequence[ClipInput]) -> Iterator[Verdict]:
        size = self.config.batch_size
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        running = []
        for batch in batches:
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            pixels, ids = np.stack([pair.pixels for pair in filled]), np.stack([pair.ids for pair in filled])
            running.append(self._scores(pixels, ids))
        for batch, scores in zip(batches, running, strict=True):
            for score in np.asarray(scores)[: len(batch)]:
                yield Verdict(score=float(score)) if np.isfinite(score) else unscored_number("score")


def _scores(folder: Path, config: ClipVerifierConfig, levels: np.ndarray) -> Scores:
    flax_model = _flax_class() if config.implementation != "own" else None
    if flax_model is not None:
        return _theirs(flax_model, folder, getattr(jnp, config.dtype), levels)
    if config.implementation == "transformers":
        raise InputError("implementation transformers: no FlaxCLIPModel here (transformers < 5 has it); take own")
    return _ours(folder, getattr(jnp, config.dtype), levels)


def _flax_class() -> Any:
    """Transformers' FlaxCLIPModel, or None where there is none."""
    try:
        return importlib.import_module("transformers.models.clip.modeling_flax_clip").FlaxCLIPModel
    except (ImportError, AttributeError):
        return None


def _ours(folder: Path, dtype: Dtype, levels: np.ndarray) -> Scores:
    graph, weights = nnx.split(load_clip_model(folder, dtype))

    @shared_jit()
    def score(weights: Any, pixels: UInt8[Array, "b y x c"], ids: Int[Array, "b t"]) -> Float[Array, " b"]:
        return nnx.merge(graph, weights)(_seen(pixels, levels), ids)

    return lambda pixels, ids: score(weights, pixels, ids)


def _theirs(flax_model: Any, folder: Path, dtype: Dtype, levels: np.ndarray) -> Scores:
    check_clip_model(folder)  # Transformers would only warn about missing weights, and initialise them at random
    try:
        model = flax_model.from_pretrained(folder, from_pt=True, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: Transformers cannot read it ({reason}); implementation own may") from error

    @shared_jit()
    def score(params: Any, pixels: UInt8[Array, "b y x c"], ids: Int[Array, "b t"]) -> Float[Array, " b"]:
        seen = _seen(pixels, levels).transpose(0, 3, 1, 2)
        return jnp.diagonal(model(input_ids=ids, pixel_values=seen, params=params).logits_per_image)

    return lambda pixels, ids: score(model.params, pixels, ids)


def _seen(pixels: Array, levels: np.ndarray) -> Array:
    return jnp.asarray(levels)[pixels, jnp.arange(levels.shape[1])]
