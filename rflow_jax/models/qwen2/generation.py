"""Text generation from embedded prompts as one program: prefill, then a loop until every sample has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rflow_jax.errors import InputError
from rflow_jax.models.layers import LoraRows
from rflow_jax.models.options import AttentionImpl
from rflow_jax.models.qwen2.model import Cache, Positions, Qwen2
from rflow_jax.typing import Array, Bool, Float, Int

NEVER = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class Decoding:
    """The choice of tokens, and the end of a text; hashable, as a program's static argument.

    Attributes:
        max_new_tokens: the longest text.
        min_new_tokens: no end before this many tokens.
        temperature: 0 takes the likeliest token; above, a token is drawn by the sample's key.
        top_p: drawn from the likeliest tokens that together have this probability.
        repetition_penalty: positive logits of tokens in the prompt or the text so far are divided by it, negative ones
            multiplied; 1 is off.
        eos: tokens that end a text.
        pad: the token after the end.
        vocabulary: tokens from this one on are never chosen (embeddings may have rows without a token); None: all.
        keep_logits: also return the logits of every step.
    """

    max_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    vocabulary: int | None = None
    keep_logits: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not 0 <= self.temperature < inf:
            raise InputError(f"temperature is {self.temperature}; expected a finite number from 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected a number above 0 and up to 1")
        if not 0 < self.repetition_penalty < inf:
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; expected a finite number above 0")


class Prompts(NamedTuple):
    """A batch of prompts.

    Attributes:
        x: embeddings, padded on the right.
        positions: rotary positions of the embeddings, as :class:`Qwen2` takes them.
        lengths: embeddings of each prompt before its padding, from 1.
        next_position: rotary position (on all axes) of the first new token.
        live: False for filler rows, which generate nothing.
        keys: random keys, one per row; None if nothing is drawn.
        ids: the prompts' tokens, pictures' included; None if repetition is not penalised.
    """

    x: Float[Array, "b t d"]
    positions: Positions
    lengths: Int[Array, " b"]
    next_position: Int[Array, " b"]
    live: Bool[Array, " b"]
    keys: Array | None = None
    ids: Int[Array, "b t"] | None = None


class GeneratedTokens(NamedTuple):
    """Tokens, padded after their end; their numbers, the end counted; logits if kept."""

    tokens: Int[Array, "b m"]
    lengths: Int[Array, " b"]
    logits: Float[Array, "b m v"] | None


class _State(NamedTuple):
    step: Int[Array, ""]  # tokens chosen so far
    token: Int[Array, " b"]  # the last of them
    done: Bool[Array, " b"]
    made: GeneratedTokens
    cache: Cache
    seen: Bool[Array, "b v"] | None  # tokens of the prompt and of the text so far; None: not needed


def generate(
    decoder: Qwen2,
    prompts: Prompts,
    decoding: Decoding,
    *,
    lora: LoraRows = None,
    attention: AttentionImpl = "auto",
) -> GeneratedTokens:
    """Continues every prompt; to be jitted, with ``decoding`` static.

    A sample's tokens depend on its prompt and its key; neighbours and padding affect them only through the rounding of
    the logits.
    """
    capacity = prompts.x.shape[1] + decoding.max_new_tokens
    hidden, cache = decoder.prefill(
        prompts.x, prompts.positions, prompts.lengths, capacity, lora=lora, attention=attention
    )
    last = jnp.take_along_axis(hidden, (prompts.lengths - 1)[:, None, None], axis=1)
    choose = _chooser(decoding, prompts.keys)

    def advance(state: _State) -> _State:
        x = decoder.embed(state.token[:, None]).astype(prompts.x.dtype)
        positions = (prompts.next_position + state.step - 1)[:, None]
        hidden, cache = decoder.step(x, positions, state.cache, lora=lora)
        return _take(state._replace(cache=cache), decoder.logits(hidden[:, 0]), choose, decoding)

    b, m = prompts.x.shape[0], decoding.max_new_tokens
    logits = jnp.zeros((b, m, decoder.config.vocab_size), jnp.float32) if decoding.keep_logits else None
    zero = jnp.zeros((b,), jnp.int32)
    nothing = GeneratedTokens(jnp.full((b, m), decoding.pad, jnp.int32), zero, logits)
    seen = None if decoding.repetition_penalty == 1 else _tokens_of(prompts, decoder.config.vocab_size)
    start = _State(jnp.zeros((), jnp.int32), zero, ~prompts.live, nothing, cache, seen)
    first = _take(start, decoder.logits(last[:, 0]), choose, decoding)
    return jax.lax.while_loop(lambda state: (state.step < m) & ~jnp.all(state.done), advance, first).made


_Choose = Callable[[Array, Array], Array]


def _tokens_of(prompts: Prompts, vocabulary: int) -> Bool[Array, "b v"]:
    """Whether each prompt contains each token, its padding not counted."""
    if prompts.ids is None:
        raise InputError("a repetition_penalty needs the tokens of the prompts")
    b, t = prompts.ids.shape
    own = jnp.where(jnp.arange(t) < prompts.lengths[:, None], prompts.ids, vocabulary)  # beyond the last is dropped
    return jnp.zeros((b, vocabulary), bool).at[jnp.arange(b)[:, None], own].set(True, mode="drop")


def penalised(logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: float) -> Float[Array, "b v"]:
    """Logits with those of seen tokens made less likely.

    Source: ``RepetitionPenaltyLogitsProcessor`` of Transformers.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _take(state: _State, logits: Float[Array, "b v"], choose: _Choose, decoding: Decoding) -> _State:
    """Chooses a token from the logits and adds it to the state."""
    fair = logits if state.seen is None else penalised(logits, state.seen, decoding.repetition_penalty)
    token = jnp.where(state.done, decoding.pad, choose(fair, state.step))
    made = GeneratedTokens(
        state.made.tokens.at[:, state.step].set(token),
        state.made.lengths + ~state.done,
        None if state.made.logits is None else state.made.logits.at[:, state.step].set(logits),
    )
    ends = jnp.isin(token, jnp.asarray(decoding.eos, jnp.int32))
    seen = None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    return _State(state.step + 1, token, state.done | ends, made, state.cache, seen)


def _chooser(decoding: Decoding, keys: Array | None) -> _Choose:
    """(logits [b, v], number of the token) -> tokens [b]."""
    if decoding.temperature > 0 and keys is None:
        raise InputError("drawing tokens (temperature above 0) needs a key for each sample")

    def choose(logits: Array, step: Array) -> Array:
        tokens = jnp.arange(logits.shape[-1])
        if decoding.vocabulary is not None:
            logits = jnp.where(tokens < decoding.vocabulary, logits, NEVER)
        if decoding.min_new_tokens:
            ends = jnp.isin(tokens, jnp.asarray(decoding.eos, jnp.int32))
            logits = jnp.where(ends & (step < decoding.min_new_tokens), NEVER, logits)
        if decoding.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        assert keys is not None
        logits = nucleus(logits / decoding.temperature, decoding.top_p)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return jax.vmap(jax.random.categorical)(own, logits).astype(jnp.int32)

    return choose


def nucleus(logits: Float[Array, "b v"], top_p: float) -> Float[Array, "b v"]:
    """The logits of the fewest likeliest tokens whose probabilities add up to ``top_p``; the others can't be drawn."""
    if top_p >= 1:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, NEVER)
