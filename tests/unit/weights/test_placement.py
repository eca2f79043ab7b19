"""Parameters go from a checkpoint's bytes straight to their shards: the numbers, and the memory that a host needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rflow_jax.errors import InputError
from rflow_jax.parallel.layout import MeshConfig
from rflow_jax.parallel.mesh import make_mesh
from rflow_jax.weights.key_mapping import KeyMapping, Rule, TensorTarget, plan
from rflow_jax.weights.loading import Arriving, place, put
from rflow_jax.weights.model_folder import save
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import Conversion, write_safetensors

LINEARS, WIDTH = 40, 2048  # 8 MiB each in bfloat16
TENSOR_BYTES = 2 * WIDTH**2
WINDOW = 4 * TENSOR_BYTES
SLACK = 3 * TENSOR_BYTES  # of the allocator and of programs
LOAD = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from flax import nnx
from rflow_jax.models.layers import Linear, abstract
from rflow_jax.parallel.layout import MeshConfig
from rflow_jax.parallel.mesh import make_mesh
from rflow_jax.parallel.sharding import sharding_for
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.loading import load_into
from rflow_jax.weights.model_folder import load_stored
from rflow_jax.weights.key_mapping import KeyMapping, Rule

folder, storage, fsdp, tensor, dtype = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]), sys.argv[5]
count, width, window = map(int, sys.argv[6:])

class Network(nnx.Module):
    def __init__(self, count, rngs):
        each = (Linear(width, width, use_bias=False, rngs=rngs, dtype=jnp.bfloat16) for _ in range(count))
        self.blocks = nnx.List(each)

table = KeyMapping("network", (Rule(r"blocks\\.(\\d+)", r"layers.\\1"),))
choose = sharding_for(make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor]))
how = {"dtype": jnp.dtype(dtype), "sharding_for": choose, "window": window}

def load(count):
    model = abstract(lambda rngs: Network(count, rngs))
    files = TensorFiles.open(folder / f"{count}.safetensors")
    if storage == "checkpoint":
        return load_into(model, table, files, **how)
    return load_stored(model, folder / storage / str(count), **how)

def resident(name="VmRSS"):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load(1)  # so that programs and threads are there
before = resident()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
model = load(count)
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
shards = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
assert shards == sum(leaf.nbytes for leaf in leaves)  # each number lies on one device
print(resident("VmHWM") - before - shards)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Iterator[Path]:
    """A folder with a network of one linear and of many, in every storage; gone after the tests."""
    root = tmp_path_factory.mktemp("checkpoints")
    table = KeyMapping("network", (Rule(r"blocks\.(\d+)", r"layers.\1"),))
    tensor = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(ml_dtypes.bfloat16)
    for count in (1, LINEARS):
        infos = {f"layers.{k}.weight": (tensor.dtype, tensor.shape) for k in range(count)}
        write_safetensors(root / f"{count}.safetensors", infos, ((key, tensor) for key in infos))
        files = TensorFiles.open(root / f"{count}.safetensors")
        the_plan = plan(table, {f"blocks.{k}.kernel": tensor.shape for k in range(count)})
        for storage in ("safetensors", "orbax"):
            folder = root / storage / str(count)
            folder.mkdir(parents=True)
            save(Conversion(the_plan, files), folder, storage)
    yield root
    shutil.rmtree(root)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("storage", "axes", "dtype", "windows"),
    [
        ("checkpoint", (4, 2), "bfloat16", 2),
        ("checkpoint", (8, 1), "float32", 2),
        ("safetensors", (1, 8), "bfloat16", 2),
        ("safetensors", (4, 2), "float32", 2),
        ("orbax", (4, 2), "bfloat16", 6),  # TensorStore reads whole chunks for every part of them
    ],
)
def test_a_host_needs_its_shards_and_two_windows(checkpoints, storage, axes, dtype, windows):
    """A second copy of the checkpoint, or of the parameters, would be beyond the bound."""
    sizes = (*axes, dtype, LINEARS, WIDTH, WINDOW)
    command = [sys.executable, "-c", LOAD, str(checkpoints), storage, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    more, bound = int(done.stdout), windows * WINDOW + SLACK
    print(f"{storage} {axes} {dtype}: {more / 2**20:.0f} MiB more than the shards, allowed are {bound / 2**20:.0f} MiB")
    assert more < bound < LINEARS * TENSOR_BYTES


MESH = {"fsdp": 2, "tensor": 2}  # and two copies along data


@pytest.mark.parametrize("spec", [P(), P("fsdp", "tensor"), P("tensor"), P(None, ("fsdp", "tensor"))])
@pytest.mark.parametrize("via", ["", "swap_halves", "pointwise"])
@pytest.mark.parametrize("dtype", [None, ml_dtypes.bfloat16])
@pytest.mark.parametrize("large", [0, 2**20])
def test_every_device_gets_its_slice(monkeypatch, spec, via, dtype, large):
    monkeypatch.setattr("rflow_jax.weights.loading.ONE_BY_ONE", large)
    target = TensorTarget("a.kernel", (16, 8), via)
    rows = np.random.default_rng(0).standard_normal(target.their_shape).astype(np.float32)
    sharding = NamedSharding(make_mesh(MeshConfig(**MESH)), spec)
    placed, want = place(target, rows, dtype, sharding), target.to_ours(rows).astype(dtype or np.float32)
    assert placed.sharding == sharding
    assert placed.dtype == want.dtype
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), want[shard.index])


def test_a_slice_that_several_devices_hold_is_cast_once(monkeypatch):
    monkeypatch.setattr("rflow_jax.weights.loading.ONE_BY_ONE", 0)
    sizes = []

    class Watched(np.ndarray):
        def astype(self, *args, **how):
            sizes.append(self.shape)
            return super().astype(*args, **how)

    value = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    sharding = NamedSharding(make_mesh(MeshConfig(**MESH)), P("fsdp", "tensor"))
    placed = put(value.view(Watched), ml_dtypes.bfloat16, sharding)
    assert sizes == [(4, 2)] * 4
    np.testing.assert_array_equal(np.asarray(placed, np.float32), value)


@pytest.mark.parametrize("number", [None, 3])
def test_one_device_holds_all(number):
    value = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    placed = put(value.T, None, None if number is None else SingleDeviceSharding(jax.devices()[number]))
    np.testing.assert_array_equal(np.asarray(placed), value.T)
    assert placed.devices() == {jax.devices()[number or 0]}


def test_arrays_on_their_way_stay_below_the_limit():
    arriving, held = Arriving(limit=100), []
    for size in (40, 40, 40, 400, 20):
        arriving.make_room(size)
        arriving.add(jax.numpy.zeros(size, jax.numpy.uint8))
        held.append([array.nbytes for array in arriving._arrays])
    assert held == [[40], [40, 40], [40, 40], [400], [20]]


def test_tensors_read_ahead_stay_below_the_limit(tmp_path):
    tensors = {f"{k:02}": np.full(10 if k % 4 else 60, k, np.uint8) for k in range(12)}
    infos = {key: (value.dtype, value.shape) for key, value in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", infos, iter(tensors.items()))
    taken, freed = [], []

    class Watched(TensorFiles):
        def read(self, key):
            tensor = super().read(key)
            taken.append(tensor.nbytes)
            weakref.finalize(tensor, freed.append, tensor.nbytes)
            return tensor

    most = 0
    for key, tensor in Watched([tmp_path / "a.safetensors"]).stream(ahead=50):
        np.testing.assert_array_equal(tensor, tensors[key])
        most = max(most, sum(taken) - sum(freed))
        del tensor
    assert most <= 60


def test_a_large_tensor_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("rflow_jax.weights.safetensors_io._PIECE", 1000)
    value = np.random.default_rng(0).standard_normal((61, 17)).astype(np.float32)
    write_safetensors(tmp_path / "a.safetensors", {"a": (value.dtype, value.shape)}, iter([("a", value)]))
    files = TensorFiles.open(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(files.read("a"), value)
    with open(tmp_path / "a.safetensors", "r+b") as file:
        file.truncate(2500)
    with pytest.raises(InputError, match="ended while a was read; copy the file again"):
        files.read("a")
