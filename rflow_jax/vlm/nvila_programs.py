"""NVILA's compiled programs: one encodes pictures, and one for each padded input length answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rflow_jax.models.nvila import Layout, Nvila, NvilaConfig
from rflow_jax.models.partitioning import constrain
from rflow_jax.models.qwen2.generation import Decoding, GeneratedTokens, Prompts, generate
from rflow_jax.parallel.programs import shared_jit, turn
from rflow_jax.parallel.sharding import on_mesh_of, whole_beside
from rflow_jax.typing import Array
from rflow_jax.weights.nvila import NvilaModel

PICTURES_AT_ONCE = 8
SHORTEST = 64  # positions


@dataclass(frozen=True)
class NvilaQuery:
    """One image and the question about it.

    Attributes:
        pictures: uint8 [pictures, y, x, 3].
        layout: of the language model's input.
    """

    pictures: np.ndarray
    layout: Layout


@dataclass(frozen=True)
class Batch:
    """Questions padded on the right to one length; filler rows make up the batch's size.

    Attributes:
        ids, feature: int32 [b, t].
        lengths: int32 [b]; 1 for a filler row.
        tokens: image tokens of all pictures [i, d].
        members: index of each row's question, in the order of the call.
    """

    ids: np.ndarray
    feature: np.ndarray
    lengths: np.ndarray
    tokens: Array
    members: list[int]


class NvilaPrograms:
    """Runs a model over questions in batches of one size.

    A question's results do not depend on its neighbours: pictures go through the tower in groups of fixed size, and the
    questions of a batch have the same padded length on their own.
    """

    def __init__(self, model: NvilaModel, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self._levels = jnp.asarray(model.levels)

    def first_logits(self, questions: Sequence[NvilaQuery]) -> np.ndarray:
        """float32 [questions, tokens]: the logits of each answer's first token, for every token of the tokenizer."""
        # All batches are dispatched before the first is waited for.
        with turn():
            running = [(batch.members, self.answer(batch)) for batch in self.batches(questions)]
        result = np.zeros((len(questions), self.model.tokenizer.size), np.float32)
        for members, logits in running:
            result[members] = np.asarray(logits)[: len(members)]
        return result

    def answer(self, batch: Batch) -> Array:
        """float32 [b, tokens]: the logits of the answer's first token."""
        return self._call(answer, *_inputs(batch))[:, : self.model.tokenizer.size]

    def greedy(self, batch: Batch, max_new_tokens: int) -> GeneratedTokens:
        """The likeliest answer, token by token, with the logits of every step."""
        tokenizer = self.model.tokenizer
        decoding = Decoding(
            max_new_tokens, (tokenizer.end,), tokenizer.pad, vocabulary=tokenizer.size, keep_logits=True
        )
        live = np.arange(len(batch.lengths)) < len(batch.members)
        return self._call(_generate, *_inputs(batch), live, decoding=decoding)

    def embeddings(self, batch: Batch) -> Array:
        """The language model's input [b, t, d], padded."""
        return self._call(_embed, batch.ids, batch.feature, batch.tokens)

    def last_states(self, batch: Batch) -> Array:
        """The last position's hidden state after the last norm [b, d]."""
        return self._call(_last_state, *_inputs(batch))

    def look(self, pictures: np.ndarray) -> Array:
        """Image tokens [slots, i, d] of at most as many pictures as a batch can have; unused slots are meaningless."""
        like = self.model.network.language.embed.embedding[...]
        tokens = jnp.zeros(token_slots(self.model.config, self.batch_size), like.dtype, device=whole_beside(like))
        for start in range(0, len(pictures), PICTURES_AT_ONCE):
            group = np.zeros((PICTURES_AT_ONCE, *pictures.shape[1:]), np.uint8)
            chosen = pictures[start : start + PICTURES_AT_ONCE]
            group[: len(chosen)] = chosen
            tokens = self._call(look, tokens, group, self._levels, start)
        return tokens

    def _call(self, program: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with on_mesh_of(self.model.weights):
            return program(self.model.graph, self.model.weights, *inputs, **options)

    def batches(self, questions: Sequence[NvilaQuery]) -> Iterator[Batch]:
        """Questions of one padded length together."""
        context = self.model.tokenizer.context
        groups: dict[int, list[int]] = {}
        for k, question in enumerate(questions):
            groups.setdefault(padded_length(len(question.layout), context), []).append(k)
        for length, members in groups.items():
            for start in range(0, len(members), self.batch_size):
                chosen = members[start : start + self.batch_size]
                yield self.batch([questions[k] for k in chosen], chosen, length)

    def batch(self, questions: Sequence[NvilaQuery], members: list[int], length: int) -> Batch:
        """Up to ``batch_size`` questions, padded to ``length``."""
        ids = np.zeros((self.batch_size, length), np.int32)
        feature = np.full((self.batch_size, length), -1, np.int32)
        lengths = np.ones(self.batch_size, np.int32)
        pictures = 0
        for row, question in enumerate(questions):
            layout, size = question.layout, len(question.layout)
            own = layout.feature + pictures * self.model.config.picture_tokens
            ids[row, :size] = layout.ids
            feature[row, :size] = np.where(layout.feature >= 0, own, -1)
            lengths[row] = size
            pictures += len(question.pictures)
        looked = self.look(np.concatenate([question.pictures for question in questions]))
        return Batch(ids, feature, lengths, looked.reshape(-1, looked.shape[-1]), members)


def token_slots(config: NvilaConfig, batch_size: int) -> tuple[int, int, int]:
    """The shape of the image tokens [slots, i, d] of as many pictures as a batch can have, in whole groups."""
    groups = -(-batch_size * config.tiling.most // PICTURES_AT_ONCE)
    return groups * PICTURES_AT_ONCE, config.picture_tokens, config.language.hidden_size


def padded_length(length: int, context: int) -> int:
    """The next of 64, 96, 128, 192, 256, 384 ...: few programs, and at most a third of padding."""
    padded = SHORTEST
    while padded < length:
        padded += padded // 2 if padded & (padded - 1) == 0 else padded // 3
    return max(length, min(padded, context))


def _inputs(batch: Batch) -> tuple[Any, ...]:
    return batch.ids, batch.feature, batch.tokens, batch.lengths


@shared_jit(static_argnums=0, donate_argnums=2)
def look(graph: nnx.GraphDef, weights: nnx.State, tokens: Array, pictures: Array, levels: Array, start: Array) -> Array:
    """``tokens`` with those of a group of pictures written from ``start`` on."""
    encoded = nnx.merge(graph, weights).look(pictures, levels)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, encoded.astype(tokens.dtype), start, 0)
    return constrain(tokens)  # replicated like the input, so that the next group uses the same program


@shared_jit(static_argnums=0)
def _embed(graph: nnx.GraphDef, weights: nnx.State, ids: Array, feature: Array, tokens: Array) -> Array:
    return nnx.merge(graph, weights).embed(ids, feature, tokens)


@shared_jit(static_argnums=0)
def _last_state(
    graph: nnx.GraphDef, weights: nnx.State, ids: Array, feature: Array, tokens: Array, lengths: Array
) -> Array:
    network: Nvila = nnx.merge(graph, weights)
    return network.last_state(network.embed(ids, feature, tokens), lengths)


@shared_jit(static_argnums=0)
def answer(graph: nnx.GraphDef, weights: nnx.State, ids: Array, feature: Array, tokens: Array, lengths: Array) -> Array:
    """The logits of the answers' first tokens."""
    network: Nvila = nnx.merge(graph, weights)
    return network.language.logits(network.last_state(network.embed(ids, feature, tokens), lengths))


@shared_jit(static_argnums=0, static_argnames="decoding")
def _generate(
    graph: nnx.GraphDef,
    weights: nnx.State,
    ids: Array,
    feature: Array,
    tokens: Array,
    lengths: Array,
    live: Array,
    *,
    decoding: Decoding,
) -> GeneratedTokens:
    network: Nvila = nnx.merge(graph, weights)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    prompts = Prompts(network.embed(ids, feature, tokens), positions, lengths, lengths, live)
    return generate(network.language, prompts, decoding)
