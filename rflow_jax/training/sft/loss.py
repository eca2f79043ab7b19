"""Batches of chats, and the loss on their answers."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rflow_jax.data.records import RecordError
from rflow_jax.data.sources.chats import PICTURE, ChatRecord
from rflow_jax.data.transforms import decode
from rflow_jax.errors import InputError
from rflow_jax.models.options import AttentionImpl, Remat
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL
from rflow_jax.tokenizers.qwen import IMAGE, QwenTokenizer, expand_images
from rflow_jax.training.qwen.batches import Rows, RowSizes, inputs_of, rows_of
from rflow_jax.training.train_state import MeanMetric, Metrics
from rflow_jax.typing import Array, Bool, Float, Int
from rflow_jax.vlm.qwen_batching import QwenSample
from rflow_jax.vlm.qwen_processing import ImageProcessorConfig, QwenProcessor
from rflow_jax.vlm.qwen_programs import embed, hidden_states


class ChatExample(NamedTuple):
    """A prepared chat.

    Attributes:
        learned: [t] bool, which of its tokens are predicted.
    """

    sample: QwenSample
    learned: np.ndarray


class ChatInputs(NamedTuple):
    """A batch of chats as arrays.

    Attributes:
        weights: of each token's loss; 0: the token is not predicted.
    """

    rows: Rows
    weights: Float[Array | np.ndarray, "b t"]


@dataclass(frozen=True)
class ChatMaker:
    """A :class:`~rflow_jax.training.qwen.batches.Collator`."""

    prepare: QwenProcessor
    sizes: RowSizes

    def example(self, chat: ChatRecord) -> ChatExample:
        """Raises RecordError for a chat that cannot be used."""
        images = [decode(content, f"{chat.key}: image {k}") for k, content in enumerate(chat.images, 1)]
        try:
            pictures = tuple(self.prepare.picture(image) for image in images)
            segments = segments_of(self.prepare.tokenizer, chat.messages)
            unit = self.prepare.config.vision.unit
            ids, learned = self._tokens(segments, [grid[1] * grid[2] // unit for _, grid in pictures])
        except InputError as error:
            raise RecordError(f"{chat.key}: {error}") from error
        sample = self.sizes.require(QwenSample(ids, pictures), self.prepare.config, chat.key)
        return ChatExample(sample, learned)

    def inputs(self, examples: Sequence[ChatExample], count: int) -> ChatInputs:
        """Examples as arrays, filled up to ``count`` with copies of the first without tokens to learn."""
        padded = [*examples, *[ChatExample(examples[0].sample, examples[0].learned & False)] * (count - len(examples))]
        samples = [example.sample for example in padded]
        rows = rows_of(samples, self.prepare.config, pad=self.prepare.tokenizer.pad, sizes=self.sizes)
        weights = np.zeros(np.shape(rows.ids), np.float32)
        for row, example in zip(weights, padded, strict=True):
            row[: len(example.learned)] = example.learned
        return ChatInputs(rows, weights)

    def digest(self, chat: ChatRecord) -> bytes:
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
    """A chat in the model's own format, cut into (text, whether it is an answer with its end token).

    Raises:
        InputError: the chat template does not render a conversation from its beginning to its end.
    """
    chat = []
    for role, text in messages:
        first, *others = text.split(PICTURE)
        content = [{"type": "text", "text": first}] if first else []
        for other in others:
            content += [{"type": "image"}, *([{"type": "text", "text": other}] if other else [])]
        chat.append({"role": role, "content": content})
    whole, done, segments = tokenizer.chat(chat, answer=False), 0, []
    for k, (role, _) in enumerate(messages):
        if role != "assistant":
            continue
        before, after = tokenizer.chat(chat[:k]), tokenizer.chat(chat[: k + 1], answer=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise InputError("the chat template does not continue a conversation, so its answers cannot be found")
        end = len(before) + len(after[len(before) :].rstrip("\n"))
        segments += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    return segments


CHUNK = 256  # tokens whose logits are in memory at once


class TokenLosses(NamedTuple):
    """The losses of every token but the first of each row."""

    loss: Float[Array, "b u"]
    right: Bool[Array, "b u"]


@dataclass(frozen=True)
class ChatObjective:
    """(trainable, frozen, chats) -> (loss, token accuracy); an :data:`~rflow_jax.training.train_state.Objective`.

    The loss is the sum of the tokens' losses by their weights, see :func:`weighed`.

    Attributes:
        graph: of the model.
        unit: patches per token.
    """

    graph: nnx.GraphDef
    rules: ImageProcessorConfig
    unit: int
    attention: AttentionImpl = "auto"
    remat: Remat = "none"

    def __call__(self, trainable: nnx.State, frozen: nnx.State, chats: ChatInputs) -> tuple[Float[Array, ""], Metrics]:
        found = self.tokens(trainable, frozen, chats)
        weights = jnp.asarray(chats.weights)[:, 1:]
        learned = weights > 0
        accuracy = MeanMetric(*(jnp.sum(x, dtype=jnp.float32) for x in (found.right & learned, learned)))
        return jnp.sum(found.loss * weights), {"token_accuracy": accuracy}

    def tokens(self, trainable: nnx.State, frozen: nnx.State, chats: ChatInputs) -> TokenLosses:
        """Cross entropy in float32, and whether the likeliest token is the right one."""
        model: Qwen25VL = nnx.merge(self.graph, trainable, frozen)
        inputs = inputs_of(chats.rows, self.unit)
        x = embed(model, self.rules, inputs, attention=self.attention)
        hidden = hidden_states(model, x, inputs, True, attention=self.attention, remat=self.remat)
        return _next_token_losses(model, hidden[:, :-1], jnp.asarray(inputs.ids)[:, 1:])


def weighed(chats: ChatInputs, parts: int) -> ChatInputs:
    """Scales the weights so that the mean over equal parts of the batch is the mean over all predicted tokens."""
    weights = jnp.asarray(chats.weights).at[:, 0].set(0)
    return chats._replace(weights=weights * parts / jnp.maximum(jnp.sum(weights), 1))


def _next_token_losses(model: Qwen25VL, hidden: Float[Array, "b u d"], ids: Int[Array, "b u"]) -> TokenLosses:
    b, u, d = hidden.shape
    size = min(CHUNK, u)
    chunks = -(-u // size)
    padding = chunks * size - u
    x = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(b, chunks, size, d).swapaxes(0, 1)
    targets = jnp.pad(ids, ((0, 0), (0, padding))).reshape(b, chunks, size).swapaxes(0, 1)

    @jax.checkpoint
    def chunk(x: Array, targets: Array) -> TokenLosses:
        logits = model.language.logits(x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return TokenLosses(losses, jnp.argmax(logits, axis=-1) == targets)

    _, found = jax.lax.scan(lambda _, given: (None, chunk(*given)), None, (x, targets))
    return TokenLosses(*(part.swapaxes(0, 1).reshape(b, chunks * size)[:, :u] for part in found))
