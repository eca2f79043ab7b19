"""Kernels of the transformer cut in two where their input has two parts that need not be joined."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from flax import nnx

from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.layers import SplitKernel


def splits_kernels(mesh: jax.sharding.Mesh | None, scan_blocks: bool) -> bool:
    """Whether kernels are to be split: on one GPU, with blocks in lists."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "gpu" and not scan_blocks and (mesh is None or mesh.size == 1)


def split_kernels(state: nnx.State, config: FluxConfig) -> nnx.State:
    """Splits the kernels of the single blocks' last linear into the rows of the attention and of the feed-forward part.

    Outside of any program; arrays that are split are deleted one by one, so that the device never has many of them
    twice.

    Args:
        state: parameters by block, on one device.
    """

    def split(path: tuple[Any, ...], variable: Any) -> Any:
        kernel = variable.get_value()
        if path[0] != "single_blocks" or path[2:] != ("out", "kernel") or not isinstance(kernel, jax.Array):
            return variable
        parts = tuple(map(jax.block_until_ready, _cut(kernel, config.width)))
        kernel.delete()
        return variable.replace(SplitKernel(parts))

    return nnx.from_flat_state([(path, split(path, variable)) for path, variable in nnx.to_flat_state(state)])


@partial(jax.jit, static_argnums=1)
def _cut(kernel: jax.Array, row: int) -> tuple[jax.Array, jax.Array]:
    return kernel[:row], kernel[row:]
