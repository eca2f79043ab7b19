"""NVILA: the tiling of images, the layout of the language model's input, the projector, and the whole network."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from PIL.Image import Image

from rflow_jax.errors import InputError
from rflow_jax.models.layers import LayerNorm, Linear, abstract
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2.model import Qwen2
from rflow_jax.models.siglip import SiglipVisionConfig, SiglipVisionTower
from rflow_jax.typing import Array, Float, Int, UInt8


@dataclass(frozen=True)
class Tiling:
    """The division of an image into pictures: tiles of a grid near its shape, and the whole image as a thumbnail.

    Attributes:
        size: pixels a side of each picture.
        min_tiles, max_tiles: limits on the tiles, the thumbnail not counted.
    """

    size: int
    min_tiles: int = 1
    max_tiles: int = 12

    @property
    def most(self) -> int:
        """The maximum number of pictures of an image."""
        return self.max_tiles + (self.max_tiles > 1)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the grid whose shape is nearest to the image's.

        Of grids of the same shape, the larger one is taken if it enlarges the image to less than twice its area.
        """
        ratio = width / height
        best, smallest = (1, 1), float("inf")
        for columns, rows in _grids(self.min_tiles, self.max_tiles):
            difference = abs(ratio - columns / rows)
            enough = width * height > 0.5 * self.size**2 * columns * rows
            if difference < smallest or (difference == smallest and enough):
                best, smallest = (columns, rows), difference
        return best

    def cut(self, image: Image) -> np.ndarray:
        """uint8 [pictures, size, size, 3]: tiles row by row, then the thumbnail unless there is only one tile.

        Alpha is dropped, not composited. Raises Pillow's errors if the image cannot be decoded.
        """
        image = image.convert("RGB")
        columns, rows = self.grid(*image.size)
        whole = np.asarray(image.resize((columns * self.size, rows * self.size)))
        tiles = whole.reshape(rows, self.size, columns, self.size, 3).swapaxes(1, 2)
        tiles = tiles.reshape(-1, self.size, self.size, 3)
        return tiles if len(tiles) == 1 else np.concatenate([tiles, self.square(image)])

    def square(self, image: Image) -> np.ndarray:
        """uint8 [1, size, size, 3]: the whole image in one picture, stretched to a square."""
        return np.asarray(image.convert("RGB").resize((self.size, self.size)))[None]


@cache
def _grids(least: int, most: int) -> list[tuple[int, int]]:
    """(columns, rows) by their number of tiles."""
    sides = range(1, most + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


IMAGE, VIDEO = "<image>", "<vila/video>"
MEDIA = ("<vila/sentinel>", IMAGE, VIDEO)  # tokens that VILA adds to a tokenizer without them, in this order
NEWLINE = "\n"
Template = Literal["raw", "question"]
TEXT_KIND, IMAGE_KIND, NEWLINE_KIND = 0, 1, 2  # of a position

_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    "<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
)
# The instruction that the verifier was trained with, word for word.
_QUESTION = (
    "You are an AI assistant specializing in image analysis and ranking. Your task is to analyze and compare image "
    "based on how well they match the given prompt. \nThe given prompt is:{prompt}. Please consider the prompt and "
    "the image to make a decision and response directly with 'yes' or 'no'."
)


def ask(prompt: str, template: Template) -> str:
    """The question about a prompt: the prompt as it is, or within the verifier's own question."""
    return prompt if template == "raw" else _QUESTION.replace("{prompt}", prompt)


def message(parts: Sequence[str | int]) -> str:
    """The user's message.

    Args:
        parts: texts, without image marks (which are removed), and for each image its number of pictures. A single
            image has a line for each of its pictures.
    """
    mark = IMAGE + NEWLINE if sum(not isinstance(part, str) for part in parts) == 1 else IMAGE
    return "".join(without_marks(part) if isinstance(part, str) else mark * part for part in parts).strip()


def chat(text: str) -> str:
    """The conversation with the user's message ``text``, up to the answer."""
    return _CHAT.replace("{message}", text)


def without_marks(text: str) -> str:
    """The text without the marks of pictures and videos."""
    for mark in (IMAGE, VIDEO):
        if mark in text:
            text = text.replace(mark, "").strip()
    return text


@dataclass(frozen=True)
class Layout:
    """The language model's input, position by position; all arrays are [positions].

    Attributes:
        ids: int32 token of a text or newline position; 0 at an image position.
        kind: int8: 0 text, 1 image token, 2 the newline that ends a picture.
        picture: int32 index of the picture, -1 in the text.
        source: int32 index into the tokenized text that the position came from.
        feature: int32 index into the image tokens of all pictures together, -1 elsewhere.
    """

    ids: np.ndarray
    kind: np.ndarray
    picture: np.ndarray
    source: np.ndarray
    feature: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Marks:
    """The tokenizer's ids that the layout depends on.

    Attributes:
        image: stands for a picture.
        newline: ends each picture.
        skipped: padding and end of turn, which are dropped at the beginning and after a picture.
    """

    image: int
    newline: tuple[int, ...]
    skipped: Collection[int]


def lay_out(ids: Sequence[int], marks: Marks, tokens: int) -> Layout:
    """Replaces each picture's mark by ``tokens`` image tokens and a newline."""
    columns: list[tuple[int, int, int, int, int]] = []
    pictures, begins = 0, True  # a stretch of text begins here
    for source, token in enumerate(ids):
        if token == marks.image:
            first = pictures * tokens
            columns += [(0, IMAGE_KIND, pictures, source, first + k) for k in range(tokens)]
            columns += [(end, NEWLINE_KIND, pictures, source, -1) for end in marks.newline]
            pictures, begins = pictures + 1, True
        elif not (begins and token in marks.skipped):
            columns.append((token, TEXT_KIND, -1, source, -1))
            begins = False
    table = np.asarray(columns, np.int32).reshape(-1, 5).T
    return Layout(table[0], table[1].astype(np.int8), table[2], table[3], table[4])


BLOCK = 3  # patches a side that become one token
EPS = 1e-5


class Projector(nnx.Module):
    """3 x 3 space-to-depth, then three linears with norms and exact GELU between.

    Source: ``mlp_downsample_3x3_fix`` of VILA.
    """

    def __init__(self, d_vision: int, d: int, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        deep, middle = d_vision * BLOCK**2, d_vision * BLOCK
        self.norm_in = LayerNorm(deep, eps=EPS, dtype=dtype)
        self.reduce = Linear(deep, middle, rngs=rngs, dtype=dtype)
        self.norm = LayerNorm(middle, eps=EPS, dtype=dtype)
        self.project = Linear(middle, d, rngs=rngs, dtype=dtype)
        self.out = Linear(d, d, rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "b s e"]) -> Float[Array, "b i d"]:
        """Features of a square of patches, row by row -> image tokens, row by row."""
        return self.stages(x)[-1]

    def stages(self, x: Float[Array, "b s e"]) -> list[Float[Array, "b i _"]]:
        """The outputs of the space-to-depth and of each of the seven layers after it."""
        stages = [space_to_depth(x)]
        for layer in (self.norm_in, self.reduce, _gelu, self.norm, self.project, _gelu, self.out):
            stages.append(layer(stages[-1]))
        return stages


def space_to_depth(x: Float[Array, "b s e"]) -> Float[Array, "b i f"]:
    """Each block of patches side by side in one vector, rows first; zeros fill the last blocks of rows and columns."""
    b, s, e = x.shape
    side = round(s**0.5)
    blocks = -(-side // BLOCK)
    fill = blocks * BLOCK - side
    square = jnp.pad(x.reshape(b, side, side, e), ((0, 0), (0, fill), (0, fill), (0, 0)))
    square = square.reshape(b, blocks, BLOCK, blocks, BLOCK, e).transpose(0, 1, 3, 2, 4, 5)
    return square.reshape(b, blocks**2, BLOCK**2 * e)


def tokens_of(grid: int) -> int:
    """Image tokens of a picture of ``grid`` x ``grid`` patches."""
    return (-(-grid // BLOCK)) ** 2


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


KINDS = ("vila", "llava_llama", "llava_qwen")  # VILA's names over time
PROJECTOR = "mlp_downsample_3x3_fix"
_REQUIRED = {"image_aspect_ratio": "dynamic", "mm_vision_select_feature": "cls_patch", "s2": False, "dynamic_s2": False}


@dataclass(frozen=True)
class NvilaConfig:
    """Sizes of the whole.

    Attributes:
        mm_vision_select_layer: the tower's layer whose output the projector gets; -2 is the last but one.
        min_tiles, max_tiles: limits on the tiles of an image.
    """

    vision: SiglipVisionConfig
    language: Qwen2Config
    mm_vision_select_layer: int = -2
    min_tiles: int = 1
    max_tiles: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise InputError(
                f"NVILA config: min_tiles {self.min_tiles}, max_tiles {self.max_tiles}; expected 1 <= min <= max"
            )
        depth = self.vision.num_hidden_layers
        if not -depth - 1 <= self.mm_vision_select_layer <= depth:
            raise InputError(f"NVILA config: mm_vision_select_layer {self.mm_vision_select_layer} of {depth} layers")

    @classmethod
    def from_json(cls, config: Mapping[str, Any], vision: SiglipVisionConfig, language: Qwen2Config) -> NvilaConfig:
        """From the content of the checkpoint's own ``config.json`` and the sizes of two of its parts.

        Raises:
            InputError: another network, or an unsupported image encoder.
        """
        require_nvila(config)
        for key, value in _REQUIRED.items():
            if (found := config.get(key, value)) not in (value, None):
                raise InputError(f"NVILA config: {key} {found!r} is not supported, only {value!r}")
        _require_plain_encoder(config.get("image_encoder"))
        known = ("mm_vision_select_layer", "min_tiles", "max_tiles")
        given = {key: config[key] for key in known if config.get(key) is not None}
        for key, value in given.items():
            if type(value) is not int:
                raise InputError(f"NVILA config: {key} is {value!r}; expected a whole number")
        return cls(vision, language, **given)

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.vision.image_size, self.min_tiles, self.max_tiles)

    @property
    def picture_tokens(self) -> int:
        """Image tokens of a picture."""
        return tokens_of(self.vision.grid)


def require_nvila(config: Mapping[str, Any]) -> None:
    """Raises InputError unless a checkpoint's ``config.json`` is VILA's."""
    if (kind := config.get("model_type")) not in KINDS:
        raise InputError(f"NVILA config: model_type {kind!r} is not supported, only {', '.join(KINDS)}")


def require_projector(config: Mapping[str, Any]) -> None:
    """Raises InputError unless ``mm_projector/config.json`` names the projector implemented here."""
    if (kind := config.get("mm_projector_type")) != PROJECTOR:
        raise InputError(f"mm_projector config: mm_projector_type {kind!r} is not supported, only {PROJECTOR!r}")


def _require_plain_encoder(encoder: Any) -> None:
    """Raises InputError unless a picture has no start tokens and ends in a newline; the setting is JSON inside JSON."""
    try:
        options = json.loads(encoder) if isinstance(encoder, str) else encoder or {}
        plain = options.get("start_tokens") is None and options.get("end_tokens", NEWLINE) == NEWLINE
        plain = plain and str(options.get("_target_", "BasicImageEncoder")).endswith("BasicImageEncoder")
    except (ValueError, AttributeError):
        plain = False
    if not plain:
        raise InputError(f"NVILA config: image_encoder {encoder!r} is not supported, only VILA's BasicImageEncoder")


class Nvila(nnx.Module):
    """The three networks. They compute in the dtype of their parameters.

    Source: Liu et al., "NVILA: Efficient Frontier Visual Language Models".
    """

    def __init__(self, config: NvilaConfig, *, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        d = config.language.hidden_size
        self.config = config
        self.tower = SiglipVisionTower(config.vision, rngs=rngs, dtype=dtype)
        self.projector = Projector(config.vision.hidden_size, d, rngs=rngs, dtype=dtype)
        self.language = Qwen2(config.language, rngs=rngs, dtype=dtype)

    def look(self, pictures: UInt8[Array, "p y x c"], levels: Float[Array, "256 c"]) -> Float[Array, "p i d"]:
        """The image tokens of each picture.

        Args:
            levels: the tower's input for each level of each channel.
        """
        pixels = levels[pictures, jnp.arange(levels.shape[1])]
        return self.projector(self.tower.features(pixels, self.config.mm_vision_select_layer))

    def embed(
        self, ids: Int[Array, "b t"], feature: Int[Array, "b t"], tokens: Float[Array, "i d"]
    ) -> Float[Array, "b t d"]:
        """The language model's input.

        Args:
            ids: tokens of the text.
            feature: index of the image token at a position; -1 in the text.
            tokens: image tokens of all pictures of all samples.
        """
        pictured = tokens[jnp.maximum(feature, 0)]
        return jnp.where((feature >= 0)[..., None], pictured, self.language.embed(ids).astype(tokens.dtype))

    def last_state(self, x: Float[Array, "b t d"], lengths: Int[Array, " b"]) -> Float[Array, "b d"]:
        """The hidden state of each sample's last position, after the last norm; ``x`` is padded on the right."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        hidden = self.language(x, positions)
        return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def abstract_nvila(config: NvilaConfig, dtype: Dtype = jnp.float32) -> Nvila:
    """The network as shapes, to be filled by a loader or counted."""
    return abstract(lambda rngs: Nvila(config, rngs=rngs, dtype=dtype))
