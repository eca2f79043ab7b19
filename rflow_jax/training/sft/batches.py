"""Chats with pictures -> what the network is given, and which tokens it is to predict."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rflow_jax.data.examples import decode
from rflow_jax.data.jsonl.chats import PICTURE, Chat
from rflow_jax.data.records import RecordError
from rflow_jax.errors import InputError
from rflow_jax.training.qwen.rows import Rows, RowSizes, rows_of
from rflow_jax.typing import Array, Float
from rflow_jax.vlm.qwen_inputs import Sample
from rflow_jax.vlm.qwen_prepare import Preparation
from rflow_jax.vlm.qwen_text import IMAGE, QwenTokenizer, expand_images


class ChatExample(NamedTuple):
    """A prepared chat.

    Attributes:
        learned: [t] bool, which of its tokens are to be predicted.
    """

    sample: Sample
    learned: np.ndarray


class ChatInputs(NamedTuple):
    """A batch of chats as arrays.

    Attributes:
        weights: of each token's loss; 0: the token is not to be predicted.
    """

    rows: Rows
    weights: Float[Array | np.ndarray, "b t"]


@dataclass(frozen=True)
class ChatMaker:
    """A :class:`~rflow_jax.training.qwen.batches.Maker`."""

    prepare: Preparation
    sizes: RowSizes

    def example(self, chat: Chat) -> ChatExample:
        """Raises RecordError for a chat that cannot be used."""
        images = [decode(content, f"{chat.key}: image {k}") for k, content in enumerate(chat.images, 1)]
        try:
            pictures = tuple(self.prepare.picture(image) for image in images)
            segments = segments_of(self.prepare.tokenizer, chat.messages)
            unit = self.prepare.config.vision.unit
            ids, learned = self._tokens(segments, [grid[1] * grid[2] // unit for _, grid in pictures])
        except InputError as error:
            raise RecordError(f"{chat.key}: {error}") from error
        sample = self.sizes.require(Sample(ids, pictures), self.prepare.config, chat.key)
        return ChatExample(sample, learned)

    def inputs(self, examples: Sequence[ChatExample], count: int) -> ChatInputs:
        """Examples as arrays, filled up to ``count`` with copies of the first of which nothing is learned."""
        padded = [*examples, *[ChatExample(examples[0].sample, examples[0].learned & False)] * (count - len(examples))]
        samples = [example.sample for example in padded]
        rows = rows_of(samples, self.prepare.config, pad=self.prepare.tokenizer.pad, sizes=self.sizes)
        weights = np.zeros(np.shape(rows.ids), np.float32)
        for row, example in zip(weights, padded, strict=True):
            row[: len(example.learned)] = example.learned
        return ChatInputs(rows, weights)

    def digest(self, chat: Chat) -> bytes:
        """A hash of everything in a chat."""
        sums = [zlib.crc32(image) for image in chat.images]
        return hashlib.sha256(f"{chat.messages}{sums}".encode()).digest()

    def _tokens(self, segments: Sequence[tuple[str, bool]], tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids, learned, left = [], [], list(tokens)
        for text, is_answer in segments:
            shown = text.count(IMAGE)
            own = self.prepare.tokenizer.encode(expand_images(text, left[:shown]))
            left = left[shown:]
            ids.append(own)
            learned.append(np.full(len(own), is_answer))
        return np.concatenate(ids), np.concatenate(learned)


def segments_of(tokenizer: QwenTokenizer, messages: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
    """A chat in the model's own form, cut into (text, whether it is an answer with the token that ends it).

    Raises:
        InputError: the chat template does not write a conversation from its beginning to its end.
    """
    told = [{"role": role, "content": _content(text)} for role, text in messages]
    whole, done, segments = tokenizer.chat(told, answer=False), 0, []
    for k, (role, _) in enumerate(messages):
        if role != "assistant":
            continue
        before, after = tokenizer.chat(told[:k]), tokenizer.chat(told[: k + 1], answer=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise InputError("the chat template does not continue a conversation, so its answers cannot be found")
        end = len(before) + len(after[len(before) :].rstrip("\n"))
        segments += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    return segments


def _content(text: str) -> list[dict[str, str]]:
    """A message's text and pictures, as chat templates take them."""
    first, *others = text.split(PICTURE)
    parts = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": other}] if other else [])]
    return parts
