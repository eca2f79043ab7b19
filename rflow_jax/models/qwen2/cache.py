"""Keys and values of the tokens so far, in buffers of fixed size.

A batch's prompts are padded on the right to one length; the tokens made afterwards follow in the places from there on,
the same place for every sample of the batch. So a step writes one slice, and the gap between a short prompt and its
answer is never seen. Rotary positions don't know of it: they are given with every call.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rflow_jax.typing import Array, Bool, Float, Int


class KeyValue(NamedTuple):
    """Keys and values of one layer; heads before tokens, as a step's products want them."""

    k: Float[Array, "b kv s h"]
    v: Float[Array, "b kv s h"]

    def grown(self, capacity: int) -> KeyValue:
        """With places for ``capacity`` tokens in all."""
        more = ((0, 0), (0, 0), (0, capacity - self.k.shape[2]), (0, 0))
        return KeyValue(jnp.pad(self.k, more), jnp.pad(self.v, more))

    def written(self, k: Float[Array, "b 1 kv h"], v: Float[Array, "b 1 kv h"], place: Int[Array, ""]) -> KeyValue:
        """With one token's keys and values in their place."""
        new = (x.swapaxes(1, 2).astype(self.k.dtype) for x in (k, v))
        return KeyValue(
            *(jax.lax.dynamic_update_slice_in_dim(old, one, place, 2) for old, one in zip(self, new, strict=True))
        )


class Cache(NamedTuple):
    """Everything a step needs to know of the tokens before it."""

    layers: tuple[KeyValue, ...]
    lengths: Int[Array, " b"]  # of the prompts
    padded: Int[Array, ""]  # length that the prompts were padded to: the first made token's place
    made: Int[Array, ""]  # tokens made so far

    @property
    def place(self) -> Int[Array, ""]:
        """Where the next token goes."""
        return self.padded + self.made

    def visible(self) -> Bool[Array, "b s"]:
        """The places that the next token sees: its prompt, what was made, itself."""
        places = jnp.arange(self.layers[0].k.shape[2])
        made = (places >= self.padded) & (places <= self.place)
        return (places < self.lengths[:, None]) | made
