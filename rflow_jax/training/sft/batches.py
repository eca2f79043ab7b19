"""Chats -> batches: decoded, tokenized and cut into patches by workers, then stacked."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rflow_jax.data.chats import PICTURE, Chat, ChatFile
from rflow_jax.data.examples import decode
from rflow_jax.data.loader import Loader, Made
from rflow_jax.data.records import RecordError
from rflow_jax.data.shuffle import Job, ShuffledPlan
from rflow_jax.errors import InputError
from rflow_jax.training.qwen.rows import Rows, RowSizes, rows_of
from rflow_jax.training.sft.config import ChatDataConfig
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


class ChatBatch(NamedTuple):
    """This process's chats of one step; attributes as in :class:`~rflow_jax.data.loader.HostBatch`."""

    step: int
    inputs: ChatInputs
    skipped: list[str]
    waited: float
    digest: str


@dataclass(frozen=True)
class ChatMaker:
    """Makes what the network is given of a chat."""

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


@dataclass(frozen=True)
class MakeChat:
    """Reads the chat that a job names, and prepares it; runs in a worker."""

    source: ChatFile
    maker: ChatMaker

    def __call__(self, job: Job) -> Made:
        try:
            chat = self.source.read(job.index)
            return Made(self.maker.example(chat), _digest(chat))
        except RecordError as error:
            return Made(None, b"", str(error))


class ChatLoader(Loader):
    """Batches of chats."""

    def __init__(self, plan: ShuffledPlan, source: ChatFile, maker: ChatMaker, config: ChatDataConfig, start: int):
        super().__init__(plan, MakeChat(source, maker), config, start)
        self._maker = maker

    def _batch(self, step: int, numbers: np.ndarray, made: Sequence[Made], skipped: list[str], waited: float) -> Any:
        inputs = self._maker.inputs([one.example for one in made], len(made))
        digest = hashlib.sha256(b"".join(one.digest for one in made)).hexdigest()[:16]
        return ChatBatch(step, inputs, skipped, waited, digest)


def open_chat_loader(
    source: ChatFile,
    maker: ChatMaker,
    config: ChatDataConfig,
    *,
    start: int,
    position: Mapping[str, Any] | None,
    **how: Any,
) -> ChatLoader:
    """Batches from a step on; ``how`` as in :class:`~rflow_jax.data.shuffle.ShuffledPlan`."""
    plan = ShuffledPlan(len(source), fingerprint=source.fingerprint, name="chats", position=position, **how)
    return ChatLoader(plan, source, maker, config, start)


def _content(text: str) -> list[dict[str, str]]:
    """A message's text and pictures, as chat templates take them."""
    first, *others = text.split(PICTURE)
    parts = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": other}] if other else [])]
    return parts


def _digest(chat: Chat) -> bytes:
    return hashlib.sha256(f"{chat.messages}{[zlib.crc32(image) for image in chat.images]}".encode()).digest()
