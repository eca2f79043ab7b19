"""The Qwen2 decoder: embeddings of tokens (or of pictures) -> hidden states, at once or token by token."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from rflow_jax.models.attention import AttentionImpl
from rflow_jax.models.layers import Embedding, Linear, LoraRows, RMSNorm, abstract, matmul
from rflow_jax.models.qwen2.cache import Cache, KeyValue
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2.layers import Past, Qwen2Block, as_samples
from rflow_jax.models.qwen2.rope import Rope, rope_of
from rflow_jax.models.remat import Remat, remember
from rflow_jax.typing import Array, Float, Int

Positions = Int[Array, "b t"] | Int[Array, "3 b t"]


class Qwen2(nnx.Module):
    """A decoder of embeddings; what is embedded, and where a token stands, is the caller's affair.

    Batches are padded on the right: attention is causal, so no real token sees the padding, and what the padding's own
    places give means nothing. It computes in the dtype of its input; norms, rotary angles and softmax in float32.

    Source: ``Qwen2ForCausalLM`` and the language model of ``Qwen2_5_VLForConditionalGeneration`` of Transformers.

    Args:
        head: whether it has the matrix that turns hidden states into logits (tied models need none).
    """

    def __init__(self, config: Qwen2Config, *, head: bool = True, rngs: nnx.Rngs, dtype: Dtype = jnp.float32):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.blocks = nnx.List(Qwen2Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_hidden_layers))
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        own_head = head and not config.tie_word_embeddings
        self.head = nnx.data(
            Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs, dtype=dtype) if own_head else None
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Positions,
        *,
        lora: LoraRows = None,
        attention: AttentionImpl = "auto",
        remat: Remat = "none",
    ) -> Float[Array, "b t d"]:
        """The hidden states after the last norm.

        Args:
            x: embeddings, padded on the right.
            positions: [b, t]; or [3, b, t] (time, row, column) where the config has ``mrope_section``.
            lora: the tokens that adapters act on; None: none.
            remat: what training computes again to save memory, see :data:`rflow_jax.models.remat.Remat`.
        """
        x, rope = as_samples(x), self.rope(positions)
        for block in self.blocks:
            x = remember(lambda x, rope, block=block: block(x, rope, None, lora, attention)[0], remat)(x, rope)
        return self.final_norm(x)

    def prefill(
        self,
        x: Float[Array, "b t d"],
        positions: Positions,
        lengths: Int[Array, " b"],
        capacity: int,
        *,
        lora: LoraRows = None,
        attention: AttentionImpl = "auto",
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """As a call, and the cache to go on from.

        Args:
            lengths: tokens of each prompt before its padding.
            capacity: places of the cache: the padded length and the tokens to be made.
        """
        x, rope = as_samples(x), self.rope(positions)
        layers: list[KeyValue] = []
        for block in self.blocks:
            x, tokens = block(x, rope, None, lora, attention)
            layers.append(tokens.grown(capacity))
        zero = jnp.zeros((), jnp.int32)
        return self.final_norm(x), Cache(tuple(layers), lengths, zero + x.shape[1], zero)

    def step(
        self, x: Float[Array, "b 1 d"], positions: Positions, cache: Cache, *, lora: LoraRows = None
    ) -> tuple[Float[Array, "b 1 d"], Cache]:
        """One more token a sample: its hidden state after the last norm, and the cache that holds it."""
        x, rope, place, visible = as_samples(x), self.rope(positions), cache.place, cache.visible()
        layers: list[KeyValue] = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, layer = block(x, rope, Past(layer, place, visible), lora)
            layers.append(layer)
        return self.final_norm(x), cache._replace(layers=tuple(layers), made=cache.made + 1)

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Scores of every token to come next, float32."""
        if self.head is not None:
            return matmul(hidden, self.head.kernel.get_value(), dtype=jnp.float32)
        table = self.embed.embedding[...].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def rope(self, positions: Positions) -> Rope:
        """Rotary angles at these positions."""
        config = self.config
        return rope_of(positions, config.head_dim, config.rope_theta, config.mrope_section)


def abstract_qwen2(config: Qwen2Config, dtype: Dtype = jnp.float32, *, head: bool = True) -> Qwen2:
    """The network without numbers, to be filled by a loader or counted."""
    return abstract(lambda rngs: Qwen2(config, head=head, rngs=rngs, dtype=dtype))
