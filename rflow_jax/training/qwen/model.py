"""A Qwen2.5-VL in two parts: what is trained, and what stays."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rflow_jax.errors import InputError
from rflow_jax.models.lora import init_lora
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.training.corrector.step import INIT
from rflow_jax.training.partition import dotted, on_host, shard_state
from rflow_jax.training.qwen.config import QwenTrainableConfig

# The tower's query, key and value are one matrix in a checkpoint, whose adapters cannot be told apart.
_FUSED = r"vision\.blocks\.\d+\.attn\.[qkv]"


class ParamPartition(NamedTuple):
    """A network in two parts.

    Attributes:
        graph: to be merged with both.
        trainable: the parameters that move, float32.
        frozen: the others, as they were loaded.
    """

    graph: Any
    trainable: Any
    frozen: Any

    def merged(self, trainable: Any) -> Any:
        """The network with these parameters, to be exported; every process must call it.

        Its frozen part stays on the devices where this process reaches all of it, since little of it may be wanted.
        """
        one = jax.process_count() == 1
        # New variables around the same arrays: what is set in the network is not set here.
        frozen = jax.tree.map(lambda x: x, self.frozen) if one else on_host(self.frozen)
        return nnx.merge(self.graph, on_host(trainable), frozen)


def first_key(seed: int) -> jax.Array:
    """The key of what is drawn before the first step."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), INIT)


def partition_params(
    model: Qwen25VL, config: QwenTrainableConfig, mesh: Mesh, *, seed: int, also: str = ""
) -> ParamPartition:
    """Attaches a fresh LoRA and takes apart what moves and what stays, all on the mesh.

    Args:
        also: regular expression on dotted parameter paths: these move whatever ``config`` says.

    Raises:
        InputError: a pattern matches nothing, or a linear that cannot have a LoRA.
    """
    put = sharding_for(mesh)
    if config.pattern is not None:
        rngs = nnx.Rngs(params=first_key(seed))
        how = {"alpha": config.alpha, "pattern": config.pattern, "rngs": rngs}
        init_lora(model, config.rank, sharding_for=put, **how)
    graph, trainable, frozen = split_trainable(model, config, also)
    # Steps are far below bfloat16's resolution: what moves is kept in float32 and rounded where it is used.
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return ParamPartition(graph, shard_state(trainable, put), shard_state(frozen, put))


def split_trainable(model: Qwen25VL, config: QwenTrainableConfig, also: str = "") -> tuple[Any, Any, Any]:
    """The graph of a network, of arrays or of shapes, what moves, and what stays; arguments and errors as those of
    :func:`partition_params`.
    """
    named = re.compile(config.parameters or "")

    def moves(path: Any, variable: Any) -> bool:
        if isinstance(variable, nnx.LoRAParam):
            _require_apart(dotted(path))
            return True
        name = dotted(path)
        return isinstance(variable, nnx.Param) and bool(named.fullmatch(name) or re.fullmatch(also, name))

    graph, trainable, frozen = nnx.split(model, moves, ...)
    paths = [dotted(path) for path, _ in nnx.to_flat_state(trainable)]
    if config.parameters is not None and not any(named.fullmatch(path) for path in paths):
        raise InputError(f"trainable.parameters: {config.parameters!r} matches no parameter")
    return graph, trainable, frozen


def flops_of_sample(
    parts: ParamPartition, config: Qwen25VLConfig, *, tokens: int, patches: int, pictures: int
) -> float:
    """Floating-point operations of a sample, forward and backward, of products with weights alone.

    Of frozen weights no gradient is computed, and none at all in a vision tower that stays.
    """
    sizes: dict[str, int] = {"vision": 0, "language": 0}
    for state in (parts.trainable, parts.frozen):
        for path, leaf in nnx.to_flat_state(state):
            if path[0] in sizes and leaf.get_value().ndim > 1 and "embed" not in path:
                sizes[str(path[0])] += leaf.get_value().size
    moving = {str(path[0]) for path, _ in nnx.to_flat_state(parts.trainable)}
    whole = any(not isinstance(leaf, nnx.LoRAParam) for _, leaf in nnx.to_flat_state(parts.trainable))
    language = 2 * sizes["language"] * tokens * (3 if whole else 2)
    vision = 2 * sizes["vision"] * patches * pictures * (2 if "vision" in moving else 1)
    return float(language + vision)


def _require_apart(path: str) -> None:
    module = path.rpartition(".")[0]
    if re.fullmatch(_FUSED, module):
        raise InputError(
            f"trainable.pattern: {module} can have no LoRA, since a checkpoint holds query, key and value of the "
            "vision tower as one matrix; take its out, ff.gate, ff.up and ff.down, or name its parameters in "
            "trainable.parameters"
        )
