"""Validation of fine-tuning: the loss on held-out chats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.data.sources.chats import ChatFile
from rflow_jax.parallel.mesh import put_batch, replicated, traced_on
from rflow_jax.training.qwen.batches import Collator, first_usable
from rflow_jax.training.sft.config import ChatValidationConfig
from rflow_jax.training.sft.loss import ChatInputs, ChatObjective
from rflow_jax.typing import Array


class ChatValidation:
    """Held-out chats, prepared once.

    Args:
        batch: chats evaluated at once.

    Raises:
        InputError: no chat is usable.
    """

    def __init__(
        self,
        config: ChatValidationConfig,
        source: ChatFile,
        maker: Collator,
        objective: ChatObjective,
        frozen: nnx.State,
        mesh: Mesh,
        batch: int,
    ):
        self.every = config.every
        self._mesh, self._frozen = mesh, frozen
        examples = first_usable(source, maker, config.records)
        self._batches = [maker.inputs(examples[k : k + batch], batch) for k in range(0, len(examples), batch)]

        def sums(trainable: nnx.State, frozen: nnx.State, chats: ChatInputs) -> tuple[Array, Array, Array]:
            found, weights = objective.tokens(trainable, frozen, chats), jnp.asarray(chats.weights)[:, 1:]
            return jnp.sum(found.loss * weights), jnp.sum(found.right * weights), jnp.sum(weights)

        self._sums = jax.jit(traced_on(mesh, sums), out_shardings=replicated(mesh))

    def run(self, step: int, trainable: nnx.State) -> dict[str, float]:
        """``validation/loss`` and ``validation/token_accuracy``, over all predicted tokens."""
        # Every process reads all chats, and keeps the rows of its devices.
        puts = (put_batch(self._mesh, batch, whole=True) for batch in self._batches)
        sums = [jax.device_get(self._sums(trainable, self._frozen, put)) for put in puts]
        loss, right, count = (float(sum(part)) for part in zip(*sums, strict=True))
        return {"validation/loss": loss / count, "validation/token_accuracy": right / count}
