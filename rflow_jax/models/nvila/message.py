"""The text that NVILA is asked with, and where each position of its input comes from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

IMAGE, VIDEO = "<image>", "<vila/video>"
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
    """What is asked about a prompt: the prompt as it is, or the verifier's own question around it."""
    return prompt if template == "raw" else _QUESTION.replace("{prompt}", prompt)


def message(parts: Sequence[str | int]) -> str:
    """The user's message.

    Args:
        parts: texts, and for each image the number of pictures that it became. A text cannot speak of images by their
            mark: it is taken out of it. A lone image has a line for each of its pictures.
    """
    alone = sum(not isinstance(part, str) for part in parts) == 1
    pieces = []
    for part in parts:
        if isinstance(part, str):
            pieces.append(without_marks(part))
        else:
            pieces.append((IMAGE + NEWLINE) * part if alone else IMAGE * part)
    return "".join(pieces).strip()


def chat(text: str) -> str:
    """The conversation in which the user said ``text``, up to the answer."""
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
        skipped: padding and end of turn; they are dropped at the beginning and behind a picture.
    """

    image: int
    newline: tuple[int, ...]
    skipped: Collection[int]


def lay_out(ids: Sequence[int], marks: Marks, tokens: int) -> Layout:
    """Puts ``tokens`` image tokens and a newline in the place of each picture's mark."""
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
