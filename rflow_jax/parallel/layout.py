"""How devices and processes are to be laid out; needs no JAX, so that a command line's --help need not wait for it."""

import math
from dataclasses import asdict, dataclass

from rflow_jax.errors import InputError

REST = -1
AXES = ("data", "fsdp", "sequence", "tensor")  # of the mesh, in order: those that talk most lie closest together


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; -1 for one of them takes what the others leave.

    Attributes:
        data: copies of the parameters, each with samples of its own.
        fsdp: parameters are cut in so many parts and gathered where they are used; samples are spread too.
        tensor: heads and the wide part of the feed-forward layers are cut in so many parts.
        sequence: tokens of one sample are cut in so many parts: sampling of one image over several devices.
        num_slices: TPU slices joined by the data-centre network, which lie along ``data``; where it is 1, they are
            counted.
    """

    data: int = REST
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    num_slices: int = 1

    def __post_init__(self) -> None:
        sizes = self._asked()
        for axis, size in sizes.items():
            if size < 1 and size != REST:
                raise InputError(f"mesh.{axis} is {size}: give a number of devices, or -1 for the rest")
        if list(sizes.values()).count(REST) > 1:
            raise InputError("mesh: only one axis can take the rest (-1)")
        if self.num_slices < 1:
            raise InputError(f"mesh.num_slices is {self.num_slices}: give the number of TPU slices, at least 1")

    def shape(self, devices: int) -> dict[str, int]:
        """Axis -> size for so many devices, in the mesh's order.

        Raises:
            InputError: they cannot be divided so.
        """
        sizes = self._asked()
        fixed = math.prod(size for size in sizes.values() if size != REST)
        filled = {axis: devices // fixed if size == REST else size for axis, size in sizes.items()}
        if math.prod(filled.values()) != devices:
            asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise InputError(f"mesh: {asked} does not divide {devices} device{'s' if devices > 1 else ''}")
        if filled["data"] % self.num_slices:
            raise InputError(
                f"mesh.data is {filled['data']}, no multiple of the {self.num_slices} slices: every slice holds whole "
                "copies of the parameters, so give mesh.data a multiple and the other axes less"
            )
        return filled

    def _asked(self) -> dict[str, int]:
        asked = asdict(self)
        return {axis: asked[axis] for axis in AXES}


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes as one run; each is started with the same command.

    Attributes:
        enabled: on Cloud TPU, SLURM and Open MPI the rest is found out by itself.
        coordinator: host:port of process 0, where it is not.
        num_processes: how many there are.
        process_id: which of them this is.
    """

    enabled: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("coordinator", "num_processes", "process_id") if getattr(self, name) is not None]
        if given and not self.enabled:  # each process would be a run of its own, in the same folder
            raise InputError(f"distributed.{given[0]} is given without distributed.enabled: set that to true")
        if self.num_processes is not None and self.num_processes < 1:
            raise InputError(f"distributed.num_processes is {self.num_processes}: give at least 1")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or self.process_id + 1):
            raise InputError(f"distributed.process_id is {self.process_id}: give 0 to num_processes - 1")
