"""A Qwen2.5-VL split into trainable and frozen parameters."""

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
from rflow_jax.training.qwen.config import QwenRunConfig

# The tower's query, key and value are one matrix in a checkpoint, so they cannot have separate adapters.
_FUSED = r"vision\.blocks\.\d+\.attn\.[qkv]"


class ParamPartition(NamedTuple):
    """A network in two parts.

    Attributes:
        graph: to be merged with both.
        trainable: the trained parameters, float32.
        frozen: the others, as they were loaded.
    """

    graph: Any
    trainable: Any
    frozen: Any

    def merged(self, trainable: Any) -> Any:
        """The network with these parameters, to be exported; every process must call it.

        The frozen part stays on the devices if this process reaches all of it, since little of it may be needed.
        """
        one = jax.process_count() == 1
        # New variables around the same arrays: setting a variable of the network does not change ours.
        frozen = jax.tree.map(lambda x: x, self.frozen) if one else on_host(self.frozen)
        return nnx.merge(self.graph, on_host(trainable), frozen)


def first_key(seed: int) -> jax.Array:
    """The key of all draws before the first step."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), INIT)


def partition_params(model: Qwen25VL, config: QwenRunConfig, mesh: Mesh, *, also: str = "") -> ParamPartition:
    """Attaches a fresh LoRA and splits the network into trainable and frozen parameters, on the mesh.

    Args:
        also: regular expression on dotted parameter paths: these are trained whatever ``config`` says.

    Raises:
        InputError: a pattern matches nothing, or a linear that cannot have a LoRA.
    """
    put = sharding_for(mesh)
    if (lora := config.lora).target_modules is not None:
        rngs = nnx.Rngs(params=first_key(config.train.seed))
        init_lora(model, lora.rank, alpha=lora.alpha, pattern=lora.target_modules, rngs=rngs, sharding_for=put)
    graph, trainable, frozen = split_trainable(model, config.trainable_parameters, also)
    # Steps are far below bfloat16's resolution: trained parameters are float32, and rounded where they are used.
    trainable = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
    return ParamPartition(graph, shard_state(trainable, put), shard_state(frozen, put))


def split_trainable(model: Qwen25VL, parameters: str | None, also: str = "") -> tuple[Any, Any, Any]:
    """(graph, trainable, frozen) of a network, of arrays or of shapes; see :func:`partition_params`."""
    named = re.compile(parameters or "")

    def is_trained(path: Any, variable: Any) -> bool:
        name = dotted(path)
        if isinstance(variable, nnx.LoRAParam):
            module = name.rpartition(".")[0]
            if re.fullmatch(_FUSED, module):
                raise InputError(
                    f"lora.target_modules: {module} can have no LoRA, since a checkpoint holds query, key and value of "
                    "the vision tower as one matrix; take its out, ff.gate, ff.up and ff.down, or name its parameters "
                    "in trainable_parameters"
                )
            return True
        return isinstance(variable, nnx.Param) and bool(named.fullmatch(name) or re.fullmatch(also, name))

    graph, trainable, frozen = nnx.split(model, is_trained, ...)
    paths = [dotted(path) for path, _ in nnx.to_flat_state(trainable)]
    if parameters is not None and not any(named.fullmatch(path) for path in paths):
        raise InputError(f"trainable_parameters: {parameters!r} matches no parameter")
    return graph, trainable, frozen


def flops_of_sample(
    parts: ParamPartition, config: Qwen25VLConfig, *, tokens: int, patches: int, pictures: int
) -> float:
    """Floating-point operations of a sample, forward and backward, counting only products with weights.

    Frozen weights get no gradient, and a frozen vision tower has no backward pass at all.
    """
    sizes: dict[str, int] = {"vision": 0, "language": 0}
    for state in (parts.trainable, parts.frozen):
        for path, leaf in nnx.to_flat_state(state):
            if path[0] in sizes and leaf.get_value().ndim > 1 and "embed" not in path:
                sizes[str(path[0])] += leaf.get_value().size
    trained = nnx.to_flat_state(parts.trainable)
    lora_only = all(isinstance(leaf, nnx.LoRAParam) for _, leaf in trained)
    language = 2 * sizes["language"] * tokens * (2 if lora_only else 3)
    vision = 2 * sizes["vision"] * patches * pictures * (2 if any(path[0] == "vision" for path, _ in trained) else 1)
    return float(language + vision)
