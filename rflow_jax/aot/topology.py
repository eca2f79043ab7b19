"""TPU topologies by name, without a TPU: the devices that a program is compiled for."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    """Raises InputError for what is no name of a topology."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"topology is {name!r}: give a generation and its chips, such as v5p:2x2x1, v5e:4x4 or v6e:8x8"
        )


def topology_devices(name: str, slices: int = 1) -> Sequence[Any]:
    """The devices of a topology; to be called where ``JAX_PLATFORMS`` is ``cpu``.

    Args:
        name: such as ``v5e:4x4``: chips, not cores.
        slices: so many of it, joined by the data-centre network.

    Raises:
        InputError: libtpu is missing, does not fit JAX, or knows no such topology.
    """
    from jax.experimental import topologies

    require_topology(name)
    how = _V4 if name.startswith("v4:") else _BOUNDS.get(name, {})
    if slices > 1:
        how = how | {"num_slices": slices}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **how).devices
    except Exception as error:  # libtpu's own, of any class
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
