"""Accelerators that need not be present: TPU topologies by name, and published rates of TPUs and GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rflow_jax.errors import InputError

_NAME = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):\d+x\d+(x\d+)?")
# libtpu's own bounds of a host are larger than these slices.
_BOUNDS: dict[str, dict[str, Any]] = {
    "v5e:1x1": {"chips_per_host_bounds": (1, 1, 1)},
    "v6e:1x1": {"chips_per_host_bounds": (1, 1, 1)},
    "v5p:1x1x1": {"chips_per_host_bounds": (1, 1, 1)},
}
_V4 = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}


def require_topology(name: str) -> None:
    """Raises InputError unless ``name`` has the form of a topology's name."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"topology is {name!r}: give a generation and its chips, such as v5p:2x2x1, v5e:4x4 or v6e:8x8"
        )


def topology_devices(name: str, slices: int = 1) -> Sequence[Any]:
    """The devices of a topology; call it where ``JAX_PLATFORMS`` is ``cpu``.

    Args:
        name: such as ``v5e:4x4``: chips, not cores.
        slices: number of such slices, joined by the data-centre network.

    Raises:
        InputError: libtpu is missing, does not fit JAX, or knows no such topology.
    """
    from jax.experimental import topologies

    require_topology(name)
    options = _V4 if name.startswith("v4:") else _BOUNDS.get(name, {})
    if slices > 1:
        options = options | {"num_slices": slices}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # libtpu raises errors of any class
        raise InputError(f"topology {name}: libtpu does not make it ({str(error).splitlines()[0][:300]})") from error


def require_libtpu() -> str:
    """The version of libtpu; raises InputError where there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("libtpu")
    except PackageNotFoundError as error:
        raise InputError(
            "compiling for TPU needs libtpu: pip install 'rflow_jax[tpu]' (for jax 0.10: libtpu 0.0.42.*)"
        ) from error


GIB = 2**30
_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_LIMIT = "libtpu 0.0.42.1's RESOURCE_EXHAUSTED message"


@dataclass(frozen=True)
class Chip:
    """One chip's rates and memory.

    Attributes:
        name: the maker's name, shortened.
        kind: JAX's ``device_kind``; for NVIDIA's cards its beginning.
        flops: dense bfloat16 operations a second.
        hbm_bytes: memory that a program may use, as the compiler counts; None: unknown, the runtime decides.
        hbm_capacity: published memory.
        hbm_rate: bytes a second to and from that memory.
        link_rate: bytes a second sent over all links (ICI, NVLink) of the chip together, in one direction: half of what
            is published as bidirectional. A collective along one axis of a torus has that axis' links alone, and is
            slower.
        dcn_rate: bytes a second sent over the data centre's network, a host's cards shared among its chips; None where
            nothing is published.
        devices: JAX devices a chip, as ``jax.experimental.topologies`` shows them.
        sources: attribute -> the source of its figure, and the figure's wording there.
    """

    name: str
    kind: str
    flops: float
    hbm_bytes: int | None
    hbm_capacity: int
    hbm_rate: float
    link_rate: float
    dcn_rate: float | None
    devices: int
    sources: dict[str, str]

    @property
    def hbm_bytes_a_device(self) -> int | None:
        """Memory that one JAX device's program may use; None where unknown."""
        return None if self.hbm_bytes is None else self.hbm_bytes // self.devices

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def _tpu_sources(page: str, *, compute: str, memory: str, links: str, network: str, limit: str) -> dict[str, str]:
    url = _DOCS + page
    return {
        "flops": f"{url}: {compute}",
        "hbm_bytes": f"{_LIMIT}: {limit}",
        "hbm_capacity": f"{url}: {memory}",
        "hbm_rate": f"{url}: {memory}",
        "link_rate": links if "://" in links else f"{url}: {links}",
        "dcn_rate": f"{url}: {network}" if network else "not published",
    }


V4 = Chip(
    name="TPU v4",
    kind="TPU v4",
    flops=275e12,
    hbm_bytes=int(2 * 15.25 * GIB),
    hbm_capacity=32 * GIB,
    hbm_rate=1.2e12,
    link_rate=300e9,
    dcn_rate=None,
    devices=2,
    sources=_tpu_sources(
        "v4",
        compute="peak compute per chip 275 teraflops (bf16 or int8)",
        memory="HBM2 capacity and bandwidth 32 GiB, 1200 GBps",
        links="https://arxiv.org/abs/2304.01433, table 4: 6 links of 50 GB/s; Cloud's page has no figure",
        network="",
        limit="15.25G a device, two devices a chip",
    ),
)
V5E = Chip(
    name="TPU v5e",
    kind="TPU v5 lite",
    flops=197e12,
    hbm_bytes=int(15.75 * GIB),
    hbm_capacity=16 * 10**9,
    hbm_rate=819e9,
    link_rate=200e9,
    dcn_rate=2 * 100e9 / 8 / 8,
    devices=1,
    sources=_tpu_sources(
        "v5e",
        compute="peak compute per chip (bf16) 197 TFLOPs",
        memory="HBM2 capacity and bandwidth 16 GB, 819 GBps (a later version of the page: 800 GiBps)",
        links="bidirectional ICI bandwidth per chip 400 GBps, halved (an earlier version: 1600 Gbps, the same)",
        network="2 x 100 Gbps NIC a host of 8 chips; 6.4 Tbps a Pod of 256 agrees",
        limit="15.75G",
    ),
)
V5P = Chip(
    name="TPU v5p",
    kind="TPU v5",
    flops=459e12,
    hbm_bytes=int(95.74 * GIB),
    hbm_capacity=95 * GIB,
    hbm_rate=2765e9,
    link_rate=600e9,
    dcn_rate=50e9 / 8,
    devices=1,
    sources=_tpu_sources(
        "v5p",
        compute="peak compute per chip (BF16) 459 TFLOPs",
        memory="HBM capacity per chip 95 GiB (of 96 physical, it says), bandwidth 2765 GBps",
        links="bidirectional ICI bandwidth per chip 1200 GBps, halved (an earlier version: 4800 Gbps, the same)",
        network="DCN bandwidth per chip 50 Gbps",
        limit="95.74G",
    ),
)
V6E = Chip(
    name="TPU v6e",
    kind="TPU v6 lite",
    flops=918e12,
    hbm_bytes=int(31.25 * GIB),
    hbm_capacity=32 * 10**9,
    hbm_rate=1638e9,
    link_rate=400e9,
    dcn_rate=100e9 / 8,
    devices=1,
    sources=_tpu_sources(
        "v6e",
        compute="peak compute per chip (bf16) 918 TFLOPs",
        memory="HBM capacity per chip 32 GB, bandwidth 1638 GBps (earlier versions: 1640, 1600)",
        links="bidirectional ICI bandwidth per chip 800 GBps, halved (an earlier version: 3584 Gbps, or 448 GB/s)",
        network="4 x 200 Gbps NIC a host of 8 chips; the TPU7x page says 100 Gbps a chip",
        limit="31.25G",
    ),
)
V7X = Chip(
    name="TPU7x",
    kind="TPU7x",
    flops=2307e12,
    hbm_bytes=int(2 * 94.75 * GIB),
    hbm_capacity=192 * GIB,
    hbm_rate=7380e9,
    link_rate=600e9,
    dcn_rate=100e9 / 8,
    devices=2,
    sources=_tpu_sources(
        "tpu7x",
        compute="peak compute per chip (BF16) 2307 TFLOPs",
        memory="HBM capacity per chip 192 GiB, bandwidth 7380 GBps",
        links="bidirectional ICI bandwidth per chip 1200 GBps, halved",
        network="DCN bandwidth per chip 100 Gbps",
        limit="94.75G a device, two devices a chip",
    ),
)


_HOPPER = "https://glennklockwood.com/garden/processors/h100"


def _gpu(name: str, kind: str, source: str, memory: int, rate: float) -> Chip:
    sources = {
        "flops": f"{_HOPPER}: BF16 989.4 TFLOPS, 1978.9 with sparsity",
        "hbm_bytes": "not read: the runtime's memory pool decides",
        "hbm_capacity": source,
        "hbm_rate": source,
        "link_rate": f"{source}: NVLink 900 GB/s, both directions together, halved",
        "dcn_rate": "depends on the server",
    }
    return Chip(name, kind, 989e12, None, memory, rate, 450e9, None, 1, sources)


H100 = _gpu("H100 SXM", "NVIDIA H100", _HOPPER, 80 * 10**9, 3.35e12)
_H200 = (
    "https://github.com/mlcommons/inference_results_v4.1, closed/NVIDIA/systems/H200-SXM-141GBx8_TRT_MaxQ.json; "
    "memory's rate: https://www.cudocompute.com/?p=3674"
)
H200 = _gpu("H200 SXM", "NVIDIA H200", _H200, 141 * 10**9, 4.8e12)
CHIPS = (V4, V5E, V5P, V6E, V7X, H100, H200)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that a ``device_kind`` belongs to; None if unknown.

    "TPU v5" is a v5p and "TPU v5 lite" a v5e. NVIDIA's names continue after the card's; only its SXM cards are known,
    not the slower PCIe and NVL ones.
    """
    if device_kind.endswith(("PCIe", "NVL")):
        return None
    kind = {"TPU v5p": "TPU v5", "TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}.get(device_kind, device_kind)
    for chip in CHIPS:
        if kind == chip.kind or (chip.kind.startswith("NVIDIA") and kind.startswith(chip.kind + " ")):
            return chip
    return None
