"""LoRA tensors to test with, in the layouts that tools write."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.models.lora import Adapter, linear_shapes
from rflow_jax.weights.key_mapping import KeyMapping, plan

TINY = FluxConfig(
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 6, 6),
)


def module_shapes(table: KeyMapping, config: FluxConfig = TINY) -> dict[str, tuple[int, int]]:
    """A checkpoint's linears: module -> (in, out)."""
    shapes = {f"{path}.kernel": shape for path, shape in linear_shapes(abstract_flux(config)).items()}
    the_plan = plan(table, shapes)
    rows = {key.removesuffix(".weight"): the_plan.their_shape(key) for key in the_plan.entries}
    return {module: (d_in, d_out) for module, (d_out, d_in) in rows.items()}


def random_lora(
    modules: Mapping[str, tuple[int, int]], rank: int = 2, *, seed: int = 0, dtype: type = np.float32
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module -> (A [r, in], B [out, r])."""
    draw = np.random.default_rng(seed)
    return {
        module: (
            draw.standard_normal((rank, d_in)).astype(dtype),
            draw.standard_normal((d_out, rank)).astype(dtype),
        )
        for module, (d_in, d_out) in modules.items()
    }


def keyed(
    lora: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    prefix: str = "",
    a: str = "lora_A.weight",
    b: str = "lora_B.weight",
    alpha: float | None = None,
    flat: bool = False,
) -> dict[str, np.ndarray]:
    """The tensors under a tool's keys; ``flat`` as kohya, with underscores for dots."""
    tensors = {}
    for module, (low, high) in lora.items():
        name = prefix + (module.replace(".", "_") if flat else module)
        tensors |= {f"{name}.{a}": low, f"{name}.{b}": high}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.asarray(alpha, np.float32)
    return tensors


def effect(adapter: Adapter) -> np.ndarray:
    """What the adapter adds for one fixed input, in float64: [out]."""
    probe = np.cos(np.arange(adapter.a.shape[1]))
    return adapter.scale * (adapter.b.astype(np.float64) @ (adapter.a.astype(np.float64) @ probe))
