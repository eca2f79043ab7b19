"""Meshes: their axes, on fake devices and on the real topologies of TPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest

from rflow_jax.errors import InputError
from rflow_jax.models import partitioning
from rflow_jax.parallel.layout import AXES, MeshConfig
from rflow_jax.parallel.mesh import make_mesh, traced_on

# Topology, slices, axes. Many of the axes are no whole axes of the physical network, which mesh_utils refuses unasked.
TOPOLOGIES = [
    ("v6e:2x4", 1, {"fsdp": 8}),
    ("v6e:4x4", 1, {"fsdp": 8}),
    ("v5e:8x8", 1, {"tensor": 2}),
    ("v5e:8x8", 1, {"fsdp": 4, "sequence": 2, "tensor": 4}),
    ("v5p:4x4x4", 1, {"fsdp": 8, "tensor": 4}),
    ("tpu7x:4x4x4", 1, {"fsdp": 16, "tensor": 4}),
    ("v6e:4x4", 2, {"fsdp": 16}),
    ("v6e:4x4", 2, {"fsdp": 8, "tensor": 2}),
    ("v5p:4x4x4", 4, {"fsdp": 8, "tensor": 4, "num_slices": 4}),
    ("v6e:4x4", 4, {"data": 2, "fsdp": 32}),
    ("v6e:4x4", 2, {"fsdp": 16, "num_slices": 4}),
    ("v6e:4x4", 1, {"fsdp": 8, "num_slices": 2}),
]
# Loading libtpu says what it will to stderr, and belongs into a process without other tests.
IN_A_CHILD = """
import json, logging, sys
from jax.experimental.topologies import get_topology_desc
from rflow_jax.errors import InputError
from rflow_jax.parallel.layout import MeshConfig
from rflow_jax.parallel.mesh import make_mesh

said = []
handler = logging.Handler(logging.INFO)
handler.emit = lambda record: said.append(record.getMessage())
log = logging.getLogger("rflow_jax.parallel.mesh")
log.addHandler(handler)
log.setLevel(logging.INFO)

def describe(topology, slices, axes):
    how = {} if slices == 1 else {"num_slices": slices}
    devices = get_topology_desc(platform="tpu", topology_name=topology, **how).devices
    said.clear()
    try:
        mesh = make_mesh(MeshConfig(**axes), devices)
    except InputError as error:
        return {"error": str(error)}
    rows = [sorted({getattr(device, "slice_index", 0) for device in row.flat}) for row in mesh.devices]
    return {"shape": dict(mesh.shape), "distinct": len(set(mesh.devices.flat)), "rows": rows, "said": list(said)}

print(json.dumps([describe(*case) for case in json.loads(sys.argv[1])]))
"""


@dataclass(frozen=True)
class FakeTpu:
    """What a mesh wants to know of a device; of a kind that is unknown to JAX."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU of tomorrow"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.fixture(scope="module")
def described():
    """(topology, slices, axes) -> what became of the mesh over it."""
    pytest.importorskip("libtpu")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    child = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD, json.dumps(TOPOLOGIES)], env=env, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    return lambda *case: found[TOPOLOGIES.index(case)]


@pytest.mark.parametrize(("topology", "slices", "axes"), TOPOLOGIES[:6])
def test_any_axes_on_a_slice(described, topology, slices, axes):
    found = described(topology, slices, axes)
    sizes = found["shape"]
    assert list(sizes) == list(AXES)
    assert {axis: sizes[axis] for axis in axes} == axes
    assert found["distinct"] == sizes["data"] * sizes["fsdp"] * sizes["sequence"] * sizes["tensor"]
    assert found["said"] == []


@pytest.mark.parametrize(("topology", "slices", "axes"), TOPOLOGIES[6:9])
def test_slices_lie_along_data(described, topology, slices, axes):
    found = described(topology, slices, axes)
    data = found["shape"]["data"]
    assert data % slices == 0
    assert found["rows"] == [[row // (data // slices)] for row in range(data)]
    told = f"mesh: the devices are of {slices} TPU slices, which lie along axis data"
    assert found["said"] == ([] if "num_slices" in axes else [told])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (9, "mesh.data is 2, not a multiple of the 4 slices: every slice holds whole copies"),
        (10, "mesh.num_slices is 4, but the devices are of 2 slices: give 2, or leave it out"),
        (11, "mesh.num_slices is 2, but the devices are of 1 slice: give 1, or leave it out"),
    ],
)
def test_slices_that_are_not_there(described, case, message):
    assert described(*TOPOLOGIES[case])["error"].startswith(message)


@pytest.mark.parametrize("slices", [1, 2])
def test_devices_that_form_no_box_are_taken_in_their_order(caplog, slices):
    corners = [(0, 0, 0), (3, 0, 0), (0, 3, 0), (3, 3, 0)]
    devices = [FakeTpu(4 * k + n, k, xyz) for n, xyz in enumerate(corners) for k in range(slices)]
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices)
    assert [device.id for device in mesh.devices.flat] == list(range(4 * slices))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"mesh: {slices} x 2 x 1 x 2 does not map onto the network of the devices: they are taken in their order"
    ]


def test_machines_with_gpus_are_no_slices():
    devices = [FakeTpu(n, n // 4, (0, 0, 0), platform="gpu") for n in range(8)]
    assert make_mesh(MeshConfig(fsdp=8), devices).shape["fsdp"] == 8


def test_axes_and_their_order():
    assert AXES == (partitioning.DATA, partitioning.FSDP, partitioning.SEQUENCE, partitioning.TENSOR)
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2), jax.devices()[:8])
    assert tuple(mesh.shape.items()) == (("data", 2), ("fsdp", 2), ("sequence", 2), ("tensor", 1))
    assert MeshConfig(1, 2, 4) == MeshConfig(data=1, fsdp=2, tensor=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence": 0}, "mesh.sequence is 0: give a number of devices, or -1 for the rest"),
        ({"sequence": -1}, "mesh: only one axis can take the rest"),
        ({"sequence": 3}, "mesh: data -1 x fsdp 1 x sequence 3 x tensor 1 does not divide 8 devices"),
        ({"num_slices": 0}, "mesh.num_slices is 0: give a whole number from 1 to 1,048,576"),
        ({"num_slices": -1}, "mesh.num_slices is -1"),
        ({"num_slices": 4, "fsdp": 4}, "mesh.data is 2, not a multiple of the 4 slices"),
    ],
)
def test_sizes_that_make_no_mesh(change, message):
    with pytest.raises(InputError, match=message):
        replace(MeshConfig(), **change).shape(8)


def test_the_ambient_mesh_is_there_while_a_program_is_traced():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    seen = []

    def double(x):
        """Twice as much."""
        seen.append(dict(jax.sharding.get_abstract_mesh().shape))
        return 2 * x

    traced = traced_on(mesh, double)
    assert (traced.__name__, traced.__doc__) == ("double", "Twice as much.")
    assert jax.jit(traced)(jnp.ones(())) == 2
    assert seen == [{"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}]
    assert jax.sharding.get_abstract_mesh().empty
    assert traced_on(None, double) is double
