"""The model that is trained: which of its parameters move, in which number type, and where they live."""

from __future__ import annotations

import re
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
from rflow_jax.models.lora import REFLECTION_FLOW, attach, init_lora
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.settings import require_least, require_pattern, require_positive
from rflow_jax.training.step import INIT
from rflow_jax.weights.bundle import Bundle, load_bundle
from rflow_jax.weights.hub import resolve_lora
from rflow_jax.weights.load import ShardingFor
from rflow_jax.weights.lora.export import export_lora
from rflow_jax.weights.lora.files import read_lora


@dataclass(frozen=True)
class TrainableConfig:
    """What is trained.

    Attributes:
        rank: of the LoRA.
        alpha: its strength is alpha / rank; null is the rank.
        pattern: regular expression on dotted paths: the linears that get an adapter.
        lora: a LoRA file to start from, in place of a fresh one; it brings its own rank and linears.
        parameters: regular expression on dotted parameter paths: train these and no LoRA (".*" is all of them).
    """

    rank: int = 32
    alpha: float | None = None
    pattern: str = REFLECTION_FLOW
    lora: str | None = None
    parameters: str | None = None

    def __post_init__(self) -> None:
        require_least(self, "trainable", rank=1)
        require_positive(self, "trainable", "alpha")
        if self.parameters is not None and self.lora is not None:
            raise InputError("trainable.parameters trains the model's own parameters, so trainable.lora has no place")
        for name in ("pattern", "parameters"):
            require_pattern(f"trainable.{name}", getattr(self, name))


@dataclass(frozen=True)
class Trained:
    """A model in two parts.

    Attributes:
        bundle: everything that stays as it is; its transformer's weights are ``frozen``.
        graph: of the transformer, to be merged with both parts.
        trainable: the parameters that move, float32.
        frozen: the others, in the bundle's number type.
        is_lora: whether what moves is a LoRA.
    """

    bundle: Bundle
    graph: Any
    trainable: Any
    frozen: Any
    is_lora: bool

    @property
    def exports(self) -> str | None:
        return "lora/{step}" if self.is_lora else None

    def export(self, trainable: Any, folder: Path | None) -> None:
        """Writes the LoRA as ``pytorch_lora_weights.safetensors``, for diffusers, ComfyUI and ``infer.py``."""
        trainable = on_host(trainable)
        if folder is not None:
            export_lora(nnx.merge(self.graph, trainable, self.frozen), folder)

    def bundle_with(self, trainable: Any) -> Bundle:
        """The bundle to generate with, the moving parameters as given."""
        weights = self.bundle.weights | {"transformer": (self.frozen, trainable)}
        return replace(
            self.bundle,
            graphs=self.bundle.graphs._replace(transformer=self.graph),
            weights=weights,
            has_lora=self.is_lora,
        )


def load_trained(model: str, config: TrainableConfig, *, seed: int, dtype: str, mesh: Mesh) -> Trained:
    """Loads a model onto the mesh and takes apart what moves and what stays.

    Raises:
        InputError: the model, the LoRA or a pattern is not usable.
    """
    bundle = load_bundle(model, lora=None, lora_alpha=None, dtype=dtype, mesh=mesh)
    transformer = nnx.merge(bundle.graphs.transformer, *bundle.weights["transformer"])
    if config.parameters is None:
        _attach(transformer, config, seed)
        graph, trainable, frozen = nnx.split(transformer, nnx.LoRAParam, ...)
    else:
        chosen = re.compile(config.parameters)
        graph, trainable, frozen = nnx.split(transformer, lambda path, _: bool(chosen.fullmatch(dotted(path))), ...)
        if not jax.tree.leaves(trainable):
            raise InputError(f"trainable.parameters: {config.parameters!r} matches no parameter of {model}")
        # Steps are far below bfloat16's resolution: what moves is kept in float32 and rounded where it is used.
        trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    put = sharding_for(mesh)
    return Trained(bundle, graph, on_mesh(trainable, put), on_mesh(frozen, put), config.parameters is None)


def on_host(tree: Any) -> Any:
    """The arrays of a tree as numpy's, whole; all processes must call it where there are several."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable:
            return jax.device_get(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(fetch, tree)


def count(state: Any) -> int:
    """Numbers in a state."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def _attach(transformer: Any, config: TrainableConfig, seed: int) -> None:
    if config.lora is not None:
        read = read_lora(resolve_lora(config.lora), alpha=config.alpha)
        attach(transformer, read.adapters, dtype=jnp.float32, where=read.where)
        return
    rngs = nnx.Rngs(params=jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), INIT))
    init_lora(transformer, config.rank, alpha=config.alpha, pattern=config.pattern, rngs=rngs)


def on_mesh(state: Any, put: ShardingFor) -> Any:
    """The state with every leaf where the rules want it; what already lies there stays."""

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        sharding = put(dotted(path), leaf.shape)
        if leaf.sharding == sharding:
            return leaf
        # By way of the host: the leaf may lie on one device of this process alone.
        return jax.device_put(jax.device_get(leaf), sharding)

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, variable.replace(place(path, variable.get_value()))) for path, variable in flat])


def dotted(path: Any) -> str:
    """A path in a state with dots between its parts."""
    return ".".join(map(str, path))
