"""Attention on meshes of fake devices: kernels run per shard, and values and gradients are those of one device."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rflow_jax.models import attention as module
from rflow_jax.models.attention import attend
from rflow_jax.models.partitioning import DATA, FSDP, SEQUENCE, TENSOR, warn_once
from rflow_jax.parallel.mesh import traced_on
from tests.kit.compare import relative_error

MESHES = [(8, 1, 1, 1), (1, 4, 1, 2), (2, 1, 2, 2), (1, 1, 8, 1)]
LENGTHS = jnp.asarray([5, 1, 9, 12, 3, 12, 7, 2], jnp.int32)
MASKS = {"none": {}, "causal": {"causal": True}, "lengths": {"lengths": LENGTHS}}
MASKS["both"] = MASKS["causal"] | MASKS["lengths"]


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(shape), (DATA, FSDP, SEQUENCE, TENSOR))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "FLASH_BLOCK", 128)


@pytest.fixture
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (8, 12, heads, 8)) for key, heads in zip(keys, (8, 4, 4), strict=True))


def value_and_gradients(qkv, mesh=None, **how):
    """The output, and the gradients of a sum of it, with inputs cut along the mesh as a network's are."""

    def loss(*qkv):
        out = attend(*qkv, **how)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    if mesh is not None:
        qkv = jax.device_put(qkv, NamedSharding(mesh, PartitionSpec((DATA, FSDP))))
    (_, out), gradients = jax.jit(traced_on(mesh, jax.value_and_grad(loss, (0, 1, 2), has_aux=True)))(*qkv)
    return out, *gradients


@pytest.mark.parametrize(
    ("mask", "shape"),
    [*(("both", shape) for shape in MESHES), ("lengths", MESHES[1]), ("causal", MESHES[2]), ("none", MESHES[3])],
)
def test_kernel_per_shard_equals_reference(qkv, mask, shape):
    with jax.default_matmul_precision("highest"):
        want = value_and_gradients(qkv, impl="reference", **MASKS[mask])
        got = value_and_gradients(qkv, mesh_of(shape), impl="flash", **MASKS[mask])
    assert max(relative_error(*pair) for pair in zip(got, want, strict=True)) < 2e-5


@pytest.mark.parametrize(
    ("bias_shape", "shape"),
    [((1, 1), (2, 1, 1, 4)), ((8, 1), (1, 2, 4, 1)), ((1, 8), (1, 2, 4, 1)), ((8, 8), (2, 1, 1, 4))],
)
def test_bias_is_cut_with_its_samples_and_heads(qkv, shape, bias_shape):
    from jax.experimental.pallas import tpu as pltpu

    bias = jax.random.normal(jax.random.key(1), (*bias_shape, 12, 12))
    with jax.default_matmul_precision("highest"):
        want = value_and_gradients(qkv, impl="reference", bias=bias)
        with pltpu.force_tpu_interpret_mode(True):  # pyright: ignore[reportArgumentType] (plain XLA, no simulated TPU)
            got = value_and_gradients(qkv, mesh_of(shape), impl="flash", bias=bias)
    assert max(relative_error(*pair) for pair in zip(got, want, strict=True)) < 2e-5


@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_a_mesh_does_not_divide(qkv, caplog, causal):
    """Six heads on eight devices of ``sequence``: queries are cut instead, or the work is repeated, which is logged."""
    warn_once.cache_clear()
    q, k, v = (x[:, :8, :heads] for x, heads in zip(qkv, (6, 3, 3), strict=True))
    with jax.default_matmul_precision("highest"):
        want = value_and_gradients((q, k, v), impl="reference", causal=causal)
        got = value_and_gradients((q, k, v), mesh_of((1, 1, 8, 1)), impl="flash", causal=causal)
    assert max(relative_error(*pair) for pair in zip(got, want, strict=True)) < 2e-5
    assert ("do not divide 6 attention heads" in caplog.text) == causal


def test_keys_with_too_few_heads_are_repeated(qkv):
    """Eight devices of ``tensor``, eight heads of queries, four of keys."""
    want = attend(*qkv, impl="reference")
    got = value_and_gradients(qkv, mesh_of((1, 1, 1, 8)), impl="flash")[0]
    assert relative_error(got, want) < 2e-5


def test_inside_a_mapped_axis(qkv):
    """A program that maps over ``data`` by itself leaves the other axes to attention."""
    mesh = mesh_of((2, 1, 2, 2))
    rows = PartitionSpec(DATA)
    inner = jax.shard_map(
        lambda *qkv: attend(*qkv, impl="flash"), in_specs=rows, out_specs=rows, axis_names={DATA}, check_vma=False
    )
    got = jax.jit(traced_on(mesh, inner))(*jax.device_put(qkv, NamedSharding(mesh, rows)))
    assert relative_error(got, attend(*qkv, impl="reference")) < 2e-5
