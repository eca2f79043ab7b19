"""The layout of devices and processes; does not import JAX, which would delay a command line's --help."""

import math
from dataclasses import dataclass

from rflow_jax.errors import InputError
from rflow_jax.utils.ranges import Axis, DeviceId, Devices, require_ranges

REST = -1
AXES = ("data", "fsdp", "sequence", "tensor")  # of the mesh, in order: those that communicate most are closest together


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis; -1 for one of them takes the rest.

    Attributes:
        data: copies of the parameters, each with samples of its own.
        fsdp: number of parts of the parameters, gathered where they are used; samples are spread too.
        tensor: number of parts of the heads and of the wide part of the feed-forward layers.
        sequence: number of parts of the tokens of one sample, to sample one image on several devices.
        num_slices: TPU slices joined by the data-centre network, along ``data``; 1: they are counted.
    """

    data: Axis = REST
    fsdp: Axis = 1
    tensor: Axis = 1
    sequence: Axis = 1
    num_slices: Devices = 1

    def __post_init__(self) -> None:
        require_ranges(self, "mesh")
        sizes = self._sizes()
        for axis, size in sizes.items():
            if size == 0:
                raise InputError(f"mesh.{axis} is {size}: give a number of devices, or -1 for the rest")
        if list(sizes.values()).count(REST) > 1:
            raise InputError("mesh: only one axis can take the rest (-1)")

    def shape(self, devices: int) -> dict[str, int]:
        """Axis -> size for this number of devices, in the mesh's order.

        Raises:
            InputError: they cannot be divided this way.
        """
        sizes = self._sizes()
        fixed = math.prod(size for size in sizes.values() if size != REST)
        filled = {axis: devices // fixed if size == REST else size for axis, size in sizes.items()}
        if math.prod(filled.values()) != devices:
            asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise InputError(f"mesh: {asked} does not divide {devices} device{'s' if devices > 1 else ''}")
        if filled["data"] % self.num_slices:
            raise InputError(
                f"mesh.data is {filled['data']}, not a multiple of the {self.num_slices} slices: every slice "
                "holds whole copies of the parameters, so give mesh.data a multiple and the other axes less"
            )
        return filled

    def _sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run; each is started with the same command.

    Attributes:
        enabled: on Cloud TPU, SLURM and Open MPI the rest is detected.
        coordinator: host:port of process 0, if it is not detected.
        num_processes: of the run.
        process_id: of this process.
    """

    enabled: bool = False
    coordinator: str | None = None
    num_processes: Devices | None = None
    process_id: DeviceId | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("coordinator", "num_processes", "process_id") if getattr(self, name) is not None]
        if given and not self.enabled:  # each process would be a run of its own, in the same folder
            raise InputError(f"distributed.{given[0]} is given without distributed.enabled: set that to true")
        require_ranges(self, "distributed")
        if self.process_id is not None and not self.process_id < (self.num_processes or self.process_id + 1):
            raise InputError(f"distributed.process_id is {self.process_id}: give 0 to num_processes - 1")
