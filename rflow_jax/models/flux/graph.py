"""The structure of a FLUX transformer apart from its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer, abstract_flux
from rflow_jax.models.lora import linears, set_adapter
from rflow_jax.models.stack import of_some_blocks, stack_blocks


@dataclass(frozen=True)
class FluxGraph:
    """A transformer without parameters.

    Attributes:
        graph: NNX's part of it.
        config: its sizes.
        scan_blocks: whether blocks are stacked. Parameters may be given by block all the same.
    """

    graph: Any
    config: FluxConfig
    scan_blocks: bool = False

    @classmethod
    def of(cls, network: FluxTransformer, *, scan_blocks: bool) -> FluxGraph:
        """The structure of a network with its adapters.

        Args:
            network: with blocks in lists.
            scan_blocks: whether those of the result are stacked.
        """
        config = network.config
        if not scan_blocks:
            return cls(nnx.graphdef(network), config)
        stacked = abstract_flux(config, scan_blocks=True)
        state = jax.eval_shape(lambda state: stack_blocks(state, block_counts(config)), nnx.state(network))
        modules = linears(stacked)
        adapters: dict[str, dict[str, Any]] = {}
        for path, variable in nnx.to_flat_state(state):
            if str(path[-1]).startswith("lora_"):
                adapters.setdefault(".".join(map(str, path[:-1])), {})[str(path[-1])] = variable.get_value()
        for path, values in adapters.items():
            set_adapter(modules[path], values)
        return cls(nnx.graphdef(stacked), config, True)

    def merge(self, *states: nnx.State) -> FluxTransformer:
        """The network with these parameters, by block or stacked."""
        return nnx.merge(self.graph, *(self.stacked(state) for state in states))

    def require_stackable(self, chosen: nnx.State) -> None:
        """Raises InputError for parameters to be trained that only some of the blocks to be stacked have."""
        if self.scan_blocks and (path := of_some_blocks(chosen, block_counts(self.config))):
            raise InputError(
                f"trainable.parameters names {path} of some blocks only, and stacked blocks move together: set "
                "train.scan_blocks to false"
            )

    def stack_loaded(self, state: nnx.State) -> nnx.State:
        """The same for parameters on devices, outside of any program; those given are used up."""
        return stack_blocks(state, block_counts(self.config), free=True) if self.scan_blocks else state

    def stacked(self, state: nnx.State) -> nnx.State:
        """Parameters in the form that the network has them."""
        return stack_blocks(state, block_counts(self.config)) if self.scan_blocks else state


def block_counts(config: FluxConfig) -> dict[str, int]:
    """Numbers of blocks by the name of the list that holds them."""
    return {"double_blocks": config.num_layers, "single_blocks": config.num_single_layers}
