"""Rematerialisation of blocks, and blocks stacked into one whose parameters have a leading dimension of blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from rflow_jax.models.layers import LoRAScale
from rflow_jax.models.options import Remat
from rflow_jax.typing import Array

_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# The forward kernels of cuDNN and Pallas. Named results (jax.ad_checkpoint.checkpoint_name) would not do: a kernel also
# gives the statistics that its backward pass needs, and would run again for them.
_ATTENTION_KERNELS = {"dot_product_attention_fwd_wrapper", "pallas_call"}


def _dots_and_attention(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    return primitive.name in _ATTENTION_KERNELS or _DOTS(primitive, *arguments, **parameters)


_SAVED = {"dots": _DOTS, "dots_and_attention": _dots_and_attention, "full": None}


def apply_remat(block: Callable[..., Any], remat: Remat, *, in_scan: bool = False) -> Callable[..., Any]:
    """Applies jax.checkpoint to a block, as ``remat`` says.

    Args:
        in_scan: the block is the body of a loop, where no barriers are needed to keep the compiler from undoing this.
    """
    return block if remat == "none" else jax.checkpoint(block, policy=_SAVED[remat], prevent_cse=not in_scan)


STACKED = "block"  # the part of a parameter's path in place of a block's number


class Stack(nnx.Module):
    """Blocks of one kind as one, whose parameters have a leading dimension of blocks.

    Attributes:
        block: a block with the parameters of all; callable only through :func:`over_blocks`.
    """

    def __init__(self, blocks: Sequence[nnx.Module]):
        graph, *_ = nnx.split(blocks[0])
        states = [nnx.state(block) for block in blocks]
        self.block = nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def blocks_of(blocks: Sequence[nnx.Module], *, stacked: bool) -> nnx.List | Stack:
    """The blocks of a network, in a list or stacked."""
    return Stack(blocks) if stacked and blocks else nnx.List(blocks)


def over_blocks(
    blocks: nnx.List | Sequence[Any] | Stack,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any = None,
    *,
    remat: Remat = "none",
) -> tuple[Any, Any]:
    """Takes ``step(block, carry, input) -> (carry, output)`` with every block in turn.

    Args:
        inputs: one per block: a list for a list of blocks, arrays with a leading dimension of blocks for stacked ones;
            None: the input of every step is None.

    Returns:
        The last carry, and the outputs in the form of ``inputs``.
    """
    if isinstance(blocks, Stack):
        graph, parameters = nnx.split(blocks.block)

        def body(carry: Any, one: tuple[Any, Any]) -> tuple[Any, Any]:
            return step(nnx.merge(graph, one[0]), carry, one[1])

        return jax.lax.scan(apply_remat(body, remat, in_scan=True), carry, (parameters, inputs))
    outputs = []
    for block, given in zip(blocks, [None] * len(blocks) if inputs is None else inputs, strict=True):
        carry, output = apply_remat(partial(step, block), remat)(carry, given)
        outputs.append(output)
    return carry, outputs


def stack_blocks(state: nnx.State, lengths: Mapping[str, int], *, free: bool = False) -> nnx.State:
    """Parameters by block -> parameters of stacked blocks; stacked ones stay as they are.

    An adapter that some blocks lack is zero there, and ranks are filled up with zeros, so its effect is unchanged.

    Args:
        lengths: numbers of blocks by the name of their list.
        free: outside of a program: arrays keep their shardings, and those given are deleted kind by kind, so that the
            devices never have more than one kind twice.
    """
    flat: list[tuple[tuple[Any, ...], Any]] = []
    by_block: dict[tuple[Any, ...], dict[int, Any]] = {}
    for path, variable in nnx.to_flat_state(state):
        if path[0] in lengths and isinstance(path[1], int):
            by_block.setdefault((path[0], STACKED, *path[2:]), {})[path[1]] = variable
        else:
            flat.append((path, variable))
    for path, variables in by_block.items():
        flat.append((path, _stacked(path, variables, lengths[path[0]], _stack_and_free if free else _stack)))
    return nnx.from_flat_state(flat)


def of_some_blocks(state: nnx.State, lengths: Mapping[str, int]) -> str | None:
    """The path of a parameter, not of an adapter, that only some blocks have; None: all can be stacked."""
    counts: dict[tuple[Any, ...], int] = {}
    for path, variable in nnx.to_flat_state(state):
        if path[0] in lengths and isinstance(path[1], int) and not isinstance(variable, (nnx.LoRAParam, LoRAScale)):
            key = (path[0], STACKED, *path[2:])
            counts[key] = counts.get(key, 0) + 1
    partly = (path for path, count in counts.items() if count < lengths[str(path[0])])
    return next((".".join(map(str, (path[0], "*", *path[2:]))) for path in partly), None)


def unstack_blocks(state: nnx.State, like: nnx.State) -> nnx.State:
    """The inverse of :func:`stack_blocks` outside of a program: its zero filling is removed.

    Args:
        like: the parameters by block, or their shapes and shardings.
    """
    stacked = dict(nnx.to_flat_state(state))
    by_block: dict[tuple[Any, ...], dict[int, Any]] = {}
    for path, variable in nnx.to_flat_state(like):
        if path not in stacked:
            number: Any = path[1]
            by_block.setdefault((path[0], STACKED, *path[2:]), {})[number] = variable.get_value()
    flat = [(path, variable) for path, variable in stacked.items() if path not in by_block]
    for path, wanted in by_block.items():
        variable = stacked[path]
        shardings = [leaf.sharding for leaf in wanted.values()]
        split = _splitter(tuple((number, leaf.shape) for number, leaf in wanted.items()), tuple(shardings))
        for number, value in zip(wanted, split(variable.get_value()), strict=True):
            flat.append(((path[0], number, *path[2:]), variable.replace(value)))
    return nnx.from_flat_state(flat)


@cache
def _splitter(wanted: tuple[tuple[int, tuple[int, ...]], ...], shardings: tuple[Any, ...]) -> Callable[[Array], Any]:
    def split(stacked: Array) -> list[Array]:
        return [stacked[number][tuple(map(slice, shape))] for number, shape in wanted]

    return jax.jit(split, out_shardings=list(shardings))


def _stacked(
    path: tuple[Any, ...], variables: Mapping[int, Any], length: int, stack: Callable[[Mapping[int, Array], int], Array]
) -> Any:
    first = next(iter(variables.values()))
    if len(variables) < length and not isinstance(first, (nnx.LoRAParam, LoRAScale)):
        raise ValueError(f"{'.'.join(map(str, path))}: {len(variables)} of {length} blocks")
    leaves = {number: jax.tree.leaves(variable.get_value()) for number, variable in variables.items()}
    together = [
        stack({number: parts[index] for number, parts in leaves.items()}, length)
        for index in range(len(next(iter(leaves.values()))))
    ]
    return first.replace(jax.tree.unflatten(jax.tree.structure(first.get_value()), together))


def _stack(arrays: Mapping[int, Array], length: int) -> Array:
    shape = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays.values()), strict=True))
    zero = jnp.zeros(shape, next(iter(arrays.values())).dtype)

    def filled(array: Array | None) -> Array:
        if array is None:
            return zero
        if array.shape == shape:
            return array
        return jnp.pad(array, [(0, large - small) for small, large in zip(array.shape, shape, strict=True)])

    return jnp.stack([filled(arrays.get(number)) for number in range(length)])


def _stack_and_free(arrays: Mapping[int, Array], length: int) -> Array:
    sharding = next(iter(arrays.values())).sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    stacked = jax.jit(_stack, static_argnums=1, out_shardings=sharding)(dict(arrays), length)
    for array in arrays.values():
        array.delete()
    return stacked
