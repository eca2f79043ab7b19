"""What fine-tuning on chats minimises: the cross entropy of the answers' tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rflow_jax.models.attention import AttentionImpl
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL
from rflow_jax.models.remat import Remat
from rflow_jax.training.qwen.rows import inputs_of
from rflow_jax.training.sft.batches import ChatInputs
from rflow_jax.training.update import Metrics, Ratio
from rflow_jax.typing import Array, Bool, Float, Int
from rflow_jax.vlm.qwen import embed, hidden_states
from rflow_jax.vlm.qwen_images import ImageRules

CHUNK = 256  # tokens whose logits, as many as the vocabulary has tokens, are there at once


class TokenLosses(NamedTuple):
    """Of every token but the first of each row."""

    loss: Float[Array, "b u"]
    right: Bool[Array, "b u"]


@dataclass(frozen=True)
class ChatObjective:
    """(trainable, frozen, chats) -> (loss, token accuracy); an :data:`~rflow_jax.training.update.Objective`.

    The loss is the sum of the tokens' losses by their weights, see :func:`weighed`.

    Attributes:
        graph: of the model.
        unit: patches of a token.
    """

    graph: Any
    rules: ImageRules
    unit: int
    attention: AttentionImpl = "auto"
    remat: Remat = "none"

    def __call__(self, trainable: Any, frozen: Any, chats: ChatInputs) -> tuple[Float[Array, ""], Metrics]:
        found = self.tokens(trainable, frozen, chats)
        weights = jnp.asarray(chats.weights)[:, 1:]
        learned = weights > 0
        accuracy = Ratio(*(jnp.sum(x, dtype=jnp.float32) for x in (found.right & learned, learned)))
        return jnp.sum(found.loss * weights), {"token_accuracy": accuracy}

    def tokens(self, trainable: Any, frozen: Any, chats: ChatInputs) -> TokenLosses:
        """Cross entropy in float32, and whether the likeliest token is the right one."""
        model: Qwen25VL = nnx.merge(self.graph, trainable, frozen)
        inputs = inputs_of(chats.rows, self.unit)
        x = embed(model, self.rules, inputs, attention=self.attention)
        hidden = hidden_states(model, x, inputs, True, attention=self.attention, remat=self.remat)
        return _next_tokens(model, hidden[:, :-1], jnp.asarray(inputs.ids)[:, 1:])


def weighed(chats: ChatInputs, parts: int) -> ChatInputs:
    """The weights by which the mean over equal parts of the batch is the mean over all tokens to be predicted."""
    weights = jnp.asarray(chats.weights).at[:, 0].set(0)
    return chats._replace(weights=weights * parts / jnp.maximum(jnp.sum(weights), 1))


def _next_tokens(model: Qwen25VL, hidden: Float[Array, "b u d"], ids: Int[Array, "b u"]) -> TokenLosses:
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
