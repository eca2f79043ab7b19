"""The model that is trained: its trainable and frozen parameters, their dtypes and shardings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rflow_jax.errors import InputError
from rflow_jax.models.flux.split import split_kernels, splits_kernels
from rflow_jax.models.flux.transformer import FluxGraph, FluxTransformer
from rflow_jax.models.layers import LoRAScale
from rflow_jax.models.lora import adapters_in, attach, init_lora
from rflow_jax.models.stack import unstack_blocks
from rflow_jax.parallel.sharding import put_by, sharding_for
from rflow_jax.training.config import LoraConfig
from rflow_jax.training.corrector.step import INIT
from rflow_jax.weights.flux import FluxModel, load_flux, scans_blocks
from rflow_jax.weights.hub import resolve_lora
from rflow_jax.weights.loading import ShardingFor
from rflow_jax.weights.lora.export import export_lora
from rflow_jax.weights.lora.read import read_lora


@dataclass(frozen=True)
class PartitionedModel:
    """A model in two parts.

    Attributes:
        bundle: the rest of the model, without the transformer's weights.
        graph: of the transformer, to be merged with both parts.
        trainable: the trained parameters, float32.
        frozen: the others, in the model's dtype.
        by_block: shapes and shardings of the trained parameters by block, as they are saved, whether or not the graph
            stacks them.
        scales: of the LoRA, by block; empty if none is trained.
    """

    bundle: FluxModel
    graph: FluxGraph
    trainable: nnx.State
    frozen: nnx.State
    by_block: nnx.State
    scales: nnx.State

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA is trained."""
        return bool(jax.tree.leaves(self.scales))

    @property
    def exports(self) -> str | None:
        return "lora/{step}" if self.is_lora else None

    def to_saved(self, tree: Any) -> Any:
        """Unstacks the trained parameters (or an optimizer's numbers for each) in a tree into blocks."""
        return self._each_state(lambda state: unstack_blocks(state, self.by_block), tree)

    def to_running(self, tree: Any) -> Any:
        """The inverse of :meth:`to_saved`: parameters as the graph has them; the argument is donated."""
        return self._each_state(self.graph.stack_loaded, tree)

    def _each_state(self, function: Callable[[nnx.State], nnx.State], tree: Any) -> Any:
        if not self.graph.scan_blocks:
            return tree

        def is_state(part: Any) -> bool:
            return isinstance(part, nnx.State)

        return jax.tree.map(lambda part: function(part) if is_state(part) else part, tree, is_leaf=is_state)

    def export(self, trainable: nnx.State, folder: Path | None) -> None:
        """Writes the LoRA as ``pytorch_lora_weights.safetensors``, for diffusers, ComfyUI and ``rflow``.

        Args:
            trainable: by block.
        """
        trainable = on_host(trainable)
        if folder is not None:
            export_lora(adapters_in(trainable, self.scales), folder)

    def bundle_with(self, trainable: nnx.State) -> FluxModel:
        """The model to generate with, with these trained parameters."""
        weights = self.bundle.weights | {"transformer": (self.frozen, trainable)}
        return replace(
            self.bundle,
            graphs=self.bundle.graphs._replace(transformer=self.graph),
            weights=weights,
            has_lora=self.is_lora,
        )


def load_trainable_model(
    model: str,
    config: LoraConfig,
    parameters: str | None = None,
    *,
    seed: int,
    dtype: str,
    mesh: Mesh,
    scan_blocks: bool | None = False,
) -> PartitionedModel:
    """Loads a model onto the mesh and splits it into trainable and frozen parameters.

    Args:
        parameters: regular expression on the dotted paths of parameters that are trained in place of a LoRA.
        scan_blocks: see :func:`rflow_jax.generation.pipeline.load_pipeline`.

    Raises:
        InputError: the model, the LoRA or a pattern is not usable.
    """
    flux = load_flux(model, lora=None, lora_alpha=None, dtype=dtype, mesh=mesh)
    transformer = flux.graphs.transformer.merge(*flux.weights.pop("transformer"))
    choose = sharding_for(mesh)
    if parameters is None and config.init_from is not None:
        lora = read_lora(resolve_lora(config.init_from), alpha=config.alpha)
        attach(transformer, lora.adapters, dtype=jnp.float32, put=put_by(choose), source=lora.source)
    elif parameters is None:
        rngs = nnx.Rngs(params=jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), INIT))
        options = {"alpha": config.alpha, "pattern": config.target_modules, "sharding_for": choose}
        init_lora(transformer, config.rank, rngs=rngs, **options)
    parts = partition_params(flux, transformer, parameters, scan_blocks=scans_blocks(scan_blocks, mesh))
    if splits_kernels(mesh, parts.graph.scan_blocks):
        return replace(parts, frozen=split_kernels(parts.frozen, flux.flux_config))
    return parts


def partition_params(
    flux: FluxModel, transformer: FluxTransformer, parameters: str | None, *, scan_blocks: bool
) -> PartitionedModel:
    """Splits a transformer into trainable and frozen parameters, stacked if blocks are to be scanned.

    Raises:
        InputError: a pattern matches no parameter.
    """
    graph = FluxGraph.of(transformer, scan_blocks=scan_blocks)
    trainable, frozen, scales = split_trainable(transformer, parameters, graph, flux.name)
    scales = jax.tree.map(np.asarray, scales)  # copied: stacking donates them
    if parameters is not None:
        # Steps are far below bfloat16's resolution: trained parameters are float32, and rounded where they are used.
        trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    by_block = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainable)
    return PartitionedModel(flux, graph, graph.stack_loaded(trainable), graph.stack_loaded(frozen), by_block, scales)


def split_trainable(
    transformer: FluxTransformer, parameters: str | None, graph: FluxGraph, name: str
) -> tuple[Any, ...]:
    """The trainable part of a transformer, the frozen part, and the scales of the LoRA that is trained, all by block.

    Args:
        parameters: regular expression on their dotted paths; None: the LoRA.
        graph: of the transformer.
        name: of the model, for an error.

    Raises:
        InputError: a pattern matches no parameter, or parameters of only some of the stacked blocks.
    """
    if parameters is None:
        _, trainable, frozen = nnx.split(transformer, nnx.LoRAParam, ...)
        return trainable, frozen, nnx.state(transformer, LoRAScale)
    chosen = re.compile(parameters)
    _, trainable, frozen = nnx.split(transformer, lambda path, _: bool(chosen.fullmatch(dotted(path))), ...)
    if not jax.tree.leaves(trainable):
        raise InputError(f"trainable_parameters: {parameters!r} matches no parameter of {name}")
    graph.require_stackable(trainable)
    return trainable, frozen, nnx.State({})


def on_host(tree: Any) -> Any:
    """Fetches the whole arrays of a tree as numpy arrays; all processes must call it."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable:
            return jax.device_get(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(fetch, tree)


def count_params(state: nnx.State) -> int:
    """The number of parameters in a state."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def shard_state(state: nnx.State, put: ShardingFor) -> Any:
    """Moves every leaf of a state to its sharding, unless it is there already."""

    def move(path: Any, leaf: jax.Array) -> jax.Array:
        sharding = put(dotted(path), leaf.shape)
        if leaf.sharding == sharding:
            return leaf
        # Through the host: the leaf may be on one device of this process only.
        return jax.device_put(jax.device_get(leaf), sharding)

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, variable.replace(move(path, variable.get_value()))) for path, variable in flat])


def dotted(path: Any) -> str:
    """A path in a state, joined by dots."""
    return ".".join(map(str, path))
