"""The bytes that a compiled program sends over links, read from its optimised HLO text (``compiled.as_text()``).

What a chip sends for a collective over ``n`` chips, by the size of its operands:

===================  =============================
all-gather           output * (n - 1) / n
reduce-scatter       input * (n - 1) / n
all-reduce           2 * size * (n - 1) / n
all-to-all           size * (n - 1) / n
collective-permute   size, or nothing if every chip sends to itself
===================  =============================

These are the least bytes, as a ring sends them. Over several slices each is what a hierarchical algorithm sends: with
``m`` of the ``n`` chips in each slice, (m - 1) / m of the size within slices (of an all-to-all (m - 1) / n), and the
rest of the table's figure between them. For a TPU, XLA itself takes such collectives apart: the program is that of one
slice, and what goes between slices is a ``send`` to the MegaScale runtime, counted as a collective over slices.

Everything is counted as often as a step runs it: in a loop times its trips, in a conditional by the branch that sends
most.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
PALLAS, CUDNN = "tpu_custom_call", "__cudnn"
# Pallas on GPUs goes through Triton or Mosaic GPU.
_PALLAS_TARGETS = {PALLAS, "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2"}
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "f4e2m1fn": 0.5, "c64": 8, "c128": 16, "token": 0}

# A name, a type and the operation. A tuple's type has spaces, but none before a word with a parenthesis.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*?) ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_WIDTH = re.compile(r"\d+")
_GROUPS = re.compile(
    r"replica_groups=(\{\{[\d,{}]*\}\}|\{\}|\[\d+,\d+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\][^{]*\{.*?\})"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})?\}")
_IOTA = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? ?\{(.*)\}")
_MESH_AXIS = re.compile(r"([^,=]+)=(\d+)")
_AXIS = re.compile(r"([^,:]+)(?::\((\d+)\)(\d+))?(?:,|$)")
_CALLED = re.compile(r"\b(calls|to_apply|true_computation|false_computation|body)=%?([^\s,)}]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_CONDITION = re.compile(r"condition=%?([^\s,)]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_MEGASCALE = re.compile(r'_xla_megascale_target="\{([^}]*)\}.*?_xla_megascale_transfer_type="(\w+)"')
_COUNT = re.compile(r"(num_partitions|replica_count)=(\d+)")
_DIRECTION = re.compile(r"direction=(\w+)")
_INDEX = re.compile(r"index=(\d+)")
_OPERAND = re.compile(r"%([^\s,()]+)")
_NUMBER = re.compile(r"constant\((-?\d+)\)")

# A collective that runs beside others is written into every fusion that it runs beside; this one begins it.
_BEGINS, _SPREAD = "AsyncCollectiveStart", ("chain_id=", "async_collective_fusion_config")
_MEGASCALE_KINDS = {kind.upper().replace("-", "_"): kind for kind in KINDS}


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind and group size, in a step.

    Attributes:
        group: chips that take part together; for a transfer between slices that XLA took apart, slices.
        count: how often a step runs one.
        ici_bytes, dcn_bytes: what a chip sends in a step, within slices and between them.
    """

    kind: str
    group: int
    count: int
    ici_bytes: float
    dcn_bytes: float


@dataclass(frozen=True)
class Program:
    """What a compiled program contains besides arithmetic, counted over a step.

    Attributes:
        pallas_calls, cudnn_calls: how often kernels of Pallas and of cuDNN run.
        unknown_loops: loops whose trip count could not be read; their bodies are counted once.
        partitions: devices that the program is compiled for (of one slice, where XLA takes slices apart).
    """

    collectives: tuple[Collective, ...]
    pallas_calls: int
    cudnn_calls: int
    unknown_loops: int
    partitions: int

    @property
    def ici_bytes(self) -> float:
        return float(sum(each.ici_bytes for each in self.collectives))

    @property
    def dcn_bytes(self) -> float:
        return float(sum(each.dcn_bytes for each in self.collectives))

    def by_kind(self) -> dict[str, Collective]:
        """Each kind over groups of all sizes; ``group`` is the largest."""
        found = {}
        for kind in KINDS:
            if own := [each for each in self.collectives if each.kind == kind]:
                sums = (sum(getattr(each, name) for each in own) for name in ("count", "ici_bytes", "dcn_bytes"))
                found[kind] = Collective(kind, max(each.group for each in own), *sums)
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ici_bytes": self.ici_bytes, "dcn_bytes": self.dcn_bytes}


def read_program(text: str, *, num_slices: int = 1, slice_of: Sequence[int] | None = None) -> Program:
    """Reads an optimised HLO text.

    Args:
        num_slices: slices of the program's devices, equally large and in order. 1 for a program of one slice.
        slice_of: instead, the slice of each device, in the order of the mesh (``mesh.devices.flat``).
    """
    return _Reader(text, num_slices, slice_of).program()


@dataclass
class _Computation:
    """A computation's position in the text, and what it contains."""

    start: int
    stop: int = 0
    begins: bool = False  # it begins a collective that runs beside others
    own: list[tuple[str, int, float, float, bool]] = field(default_factory=list)  # collectives, spread or not
    calls: list[tuple[str, ...]] = field(default_factory=list)  # alternatives, of which one runs
    loops: list[tuple[str, str, int, int]] = field(default_factory=list)  # body, condition, start and stop of the line
    pallas: int = 0
    cudnn: int = 0


@dataclass
class _Sum:
    """The totals of a computation and everything it calls."""

    collectives: dict[tuple[str, int], list[int | float]]
    pallas: int = 0
    cudnn: int = 0

    def add(self, other: _Sum, times: int = 1) -> None:
        for key, values in other.collectives.items():
            mine = self.collectives.setdefault(key, [0, 0.0, 0.0])
            for i, value in enumerate(values):
                mine[i] += times * value
        self.pallas += times * other.pallas
        self.cudnn += times * other.cudnn

    def weight(self) -> tuple[float, int]:
        """Orders a conditional's branches."""
        return float(sum(ici + dcn for _, ici, dcn in self.collectives.values())), self.pallas + self.cudnn


class _Reader:
    """One pass over the lines, then sums from the entry down. Only loops' bounds are looked up again in the text."""

    def __init__(self, text: str, num_slices: int, slice_of: Sequence[int] | None):
        self.text = text
        header = dict(_COUNT.findall(text[: text.find("\n")]))
        self.partitions = int(header.get("num_partitions", 1))
        self.devices = self.partitions * int(header.get("replica_count", 1))
        each = max(self.devices // num_slices, 1)
        self.slice_of = [i // each for i in range(self.devices)] if slice_of is None else list(slice_of)
        self.computations: dict[str, _Computation] = {}
        self.callers: dict[str, tuple[str, int, int]] = {}  # loop body or condition -> computation and line of the loop
        self.entry = ""
        self.unknown = 0
        self._spans: dict[str, tuple[int, int, int]] = {}
        self._sums: dict[str, _Sum] = {}
        self._read()

    def program(self) -> Program:
        total = self._sum(self.entry)
        rows = sorted(total.collectives.items(), key=lambda row: (KINDS.index(row[0][0]), row[0][1]))
        found = tuple(Collective(kind, n, int(count), ici, dcn) for (kind, n), (count, ici, dcn) in rows)
        return Program(found, total.pallas, total.cudnn, self.unknown, self.partitions)

    def _read(self) -> None:
        here, name, position = None, "", 0
        for line in self.text.splitlines(keepends=True):
            start, position = position, position + len(line)
            if line[:1] == " ":
                if here is not None and (match := _INSTRUCTION.match(line)):
                    self._read_instruction(name, here, line, match, start)
            elif line.rstrip() == "}":  # a kernel's metadata may go over lines, and have one that begins so
                if here is not None:
                    here.stop = start
                here = None
            elif line.rstrip().endswith("{") and (match := _COMPUTATION.match(line)):
                name = match[2]
                here = self.computations[name] = _Computation(position)
                self.entry = name if match[1] else self.entry
        self.any_begins = any(each.begins for each in self.computations.values())

    def _read_instruction(self, name: str, here: _Computation, line: str, match: re.Match[str], start: int) -> None:
        operation = match[4]
        kind = operation.removesuffix("-start").removeprefix("ragged-")
        if kind in KINDS:
            here.own.append(self._collective(name, kind, operation.endswith("-start"), line, match))
        elif operation == "send" and (transfer := _MEGASCALE.search(line)):
            here.own.append(_between_slices(transfer, match[3]))
        elif operation == "while":
            body = next(called for key, called in _CALLED.findall(line, match.end()) if key == "body")
            condition = _CONDITION.search(line, match.end())
            assert condition is not None
            stop = start + len(line)
            here.loops.append((body, condition[1], start, stop))
            self.callers[body] = self.callers[condition[1]] = (name, start, stop)
        elif operation == "conditional":
            branches = _BRANCHES.search(line, match.end())
            two = [called for key, called in _CALLED.findall(line, match.end()) if key.endswith("_computation")]
            here.calls.append(tuple(_OPERAND.findall(branches[1]) if branches else two))
        elif operation == "custom-call":
            target = _TARGET.search(line, match.end())
            called = target[1] if target else ""
            here.pallas += called in _PALLAS_TARGETS
            here.cudnn += called.startswith(CUDNN)
            here.begins |= called == _BEGINS
        elif operation in ("fusion", "call", "async-start", "map"):
            here.cudnn += CUDNN in line[match.end() :] and operation == "fusion"
            called = _CALLED.findall(line, match.end())
            here.calls += [(name,) for key, name in called if key in ("calls", "to_apply")]

    def _collective(
        self, name: str, kind: str, started: bool, line: str, match: re.Match[str]
    ) -> tuple[str, int, float, float, bool]:
        # The type of a started operation is (operands, result, ...).
        parts = _parts(match[3])
        size = _bytes(parts[1] if started and kind != "all-reduce" and len(parts) > 1 else match[3])
        spread = any(mark in line for mark in _SPREAD)
        if kind == "collective-permute":
            found = _PAIRS.search(line)
            numbers = [int(number) for number in _WIDTH.findall(found[1] or "")] if found else []
            pairs = [pair for pair in zip(numbers[::2], numbers[1::2], strict=True) if pair[0] != pair[1]]
            crosses = any(self._slice(a) != self._slice(b) for a, b in pairs)
            moved = size if pairs or found is None else 0.0
            return kind, max(len(pairs), 1), 0.0 if crosses else moved, moved if crosses else 0.0, spread
        n, m, s = self._span(line)
        # XLA for TPUs writes some reduce-scatters as an all-reduce in a fusion that keeps a part of it.
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= n
        times = 2 if kind == "all-reduce" else 1
        if kind == "all-to-all":
            ici, dcn = size * (m - 1) / n, size * (n - m) / n
        else:
            ici, dcn = times * size * (m - 1) / m, times * size * (s - 1) / n
        return kind, n, ici, dcn, spread

    def _slice(self, device: int) -> int:
        return self.slice_of[device] if device < len(self.slice_of) else 0

    def _span(self, line: str) -> tuple[int, int, int]:
        """Chips of a group, how many of them are in each slice, and the number of slices."""
        match = _GROUPS.search(line)
        text = match[1] if match else "{}"
        if text not in self._spans:
            groups = replica_groups(text) or [range(self.devices if "channel_id=" in line else 1)]
            size = max(map(len, groups))
            slices = max(len({self._slice(device) for device in group}) for group in groups)
            self._spans[text] = (size, max(size // slices, 1), slices)
        return self._spans[text]

    def _sum(self, name: str) -> _Sum:
        if name in self._sums:
            return self._sums[name]
        here, total = self.computations.get(name), _Sum({})
        if here is None:
            return total
        for kind, group, ici, dcn, spread in here.own:
            if here.begins or not (spread and self.any_begins):
                total.add(_Sum({(kind, group): [1, ici, dcn]}))
        total.pallas, total.cudnn = here.pallas, here.cudnn
        for branches in here.calls:
            total.add(max((self._sum(branch) for branch in branches), key=_Sum.weight))
        for body, condition, start, stop in here.loops:
            trips = self._trips(name, body, condition, start, stop)
            self.unknown += trips is None
            total.add(self._sum(body), 1 if trips is None else trips)
        self._sums[name] = total
        return total

    def _trips(self, caller: str, body: str, condition: str, start: int, stop: int) -> int | None:
        """A loop's trip count: as noted by XLA, else from its counter's start, step and bound; None if unknown."""
        if known := _TRIPS.search(self.text, start, stop):
            return int(known[1])
        compared = self._compared(condition)
        if compared is None:
            return None
        counter, bound, direction = compared
        first, step = self._initial(body, counter), self._step(body, counter)
        if first is None or step is None or step == 0:
            return None
        last = bound + (direction == "LE") - (direction == "GE")
        ahead = (last - first) / step
        if direction == "NE":
            return int(ahead) if ahead == int(ahead) and ahead >= 0 else None
        return max(math.ceil(ahead), 0) if direction in (("LT", "LE") if step > 0 else ("GT", "GE")) else None

    def _compared(self, condition: str) -> tuple[int, int, str] | None:
        """What a loop's condition compares: the counter's index in the loop's tuple, the bound and the direction."""
        root = inner = self._root(condition)
        operands = _operands(root)
        if " fusion(" in root and (called := _CALLED.search(root)):
            inner = self._root(called[2])
            operands = [self._outer(called[2], each, operands) for each in _operands(inner)]
        direction = _DIRECTION.search(inner)
        if " compare(" not in inner or direction is None or len(operands) != 2:
            return None
        indices = [self._index(condition, each) for each in operands]
        values = [self._constant(condition, each) for each in operands]
        if indices[0] is not None and values[1] is not None:
            return indices[0], values[1], direction[1]
        if indices[1] is not None and values[0] is not None:
            turned = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
            return indices[1], values[0], turned.get(direction[1], direction[1])
        return None

    def _outer(self, fused: str, name: str, operands: list[str]) -> str:
        """The operand of a fusion that a name in it stands for."""
        number = re.search(r" parameter\((\d+)\)", self._line(fused, name))
        return operands[int(number[1])] if number else name

    def _initial(self, body: str, index: int) -> int | None:
        """The initial value of an element of a loop's tuple."""
        if body not in self.callers:
            return None
        caller, start, stop = self.callers[body]
        given = self._line(caller, _operands(self.text[start:stop])[0])
        return self._constant(caller, _operands(given)[index]) if " tuple(" in given else None

    def _step(self, body: str, index: int) -> int | None:
        """What a loop's body adds to its counter."""
        root = self._root(body)
        if " tuple(" not in root:
            return None
        line = self._line(body, self._copied(body, _operands(root)[index]))
        operands, constants = _operands(line), [None, None]
        if " fusion(" in line and (called := _CALLED.search(line)):
            line = self._root(called[2])
            constants = [self._constant(called[2], each) for each in _operands(line)]
            operands = [self._outer(called[2], each, operands) for each in _operands(line)]
        sign = 1 if " add(" in line else -1 if " subtract(" in line else 0
        if not sign or len(operands) != 2:
            return None
        for counter, other, inside in ((0, 1, constants[1]), (1, 0, constants[0])):
            value = inside if inside is not None else self._constant(body, operands[other])
            if value is not None and self._index(body, operands[counter]) == index:
                return sign * value
        return None

    def _index(self, computation: str, name: str) -> int | None:
        """The index of the element of the computation's parameter that a name stands for."""
        line = self._line(computation, self._copied(computation, name))
        index = _INDEX.search(line)
        return int(index[1]) if " get-tuple-element(" in line and index else None

    def _copied(self, computation: str, name: str) -> str:
        """What a name is a copy of, if it is one."""
        for _ in range(8):
            match = _INSTRUCTION.match(line := self._line(computation, name))
            if match is None or match[4] not in ("copy", "bitcast", "convert", "copy-done", "copy-start"):
                break
            name = _operands(line)[0]
        return name

    def _constant(self, computation: str, name: str) -> int | None:
        """The number that a name stands for, also where a loop carries it along unchanged."""
        name = self._copied(computation, name)
        if number := _NUMBER.search(self._line(computation, name)):
            return int(number[1])
        index = self._index(computation, name)
        if index is None or computation not in self.callers:
            return None
        _, start, stop = self.callers[computation]
        body = next(each[2] for each in re.finditer(_CALLED, self.text[start:stop]) if each[1] == "body")
        root = self._root(body)
        unchanged = " tuple(" in root and self._index(body, _operands(root)[index]) == index
        return self._initial(body, index) if unchanged else None

    def _line(self, computation: str, name: str) -> str:
        """The line that defines a name; "" where there is none."""
        starts = (f"  %{name} = ", f"  ROOT %{name} = ", f"  {name} = ", f"  ROOT {name} = ")
        return self._first_line(computation, *starts) if name else ""

    def _root(self, computation: str) -> str:
        return self._first_line(computation, "  ROOT ")

    def _first_line(self, computation: str, *starts: str) -> str:
        if here := self.computations.get(computation):
            for start in starts:
                if (at := self.text.find(start, here.start, here.stop)) >= 0:
                    return self.text[at : self.text.find("\n", at)]
        return ""


def replica_groups(text: str) -> list[list[int]]:
    """Devices that take part together: ``{{0,1},{2,3}}``, ``[2,2]<=[4]``, or axes of a mesh; ``{}`` names none."""
    if text.startswith("{"):
        return [[int(number) for number in _WIDTH.findall(group)] for group in text.split("},") if _WIDTH.search(group)]
    if match := _IOTA.match(text):
        return _iota(match[3], match[4]).reshape(int(match[1]), int(match[2])).tolist()
    match = _MESH.match(text)
    if match is None:
        raise ValueError(f"replica_groups={text}: not a known form")
    axes = {name.strip(): int(size) for name, size in _MESH_AXIS.findall(match[1])}
    ids, listed = np.arange(math.prod(axes.values())), match[2]
    if listed is not None and ("<=" in listed or "T(" in listed):
        if iota := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?$", listed):
            ids = _iota(iota[1], iota[2]).reshape(-1)
    elif listed is not None:
        ids = np.array([int(number) for number in _WIDTH.findall(listed)])
    return _along_axes(ids, axes, match[3])


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in a shape, then transposed."""
    sizes = [int(size) for size in shape.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers if order is None else numbers.transpose([int(axis) for axis in order.split(",")])


def _along_axes(ids: np.ndarray, axes: dict[str, int], chosen: str) -> list[list[int]]:
    """Groups along some axes of a mesh, or along parts of them: ``'a':(2)4`` is the middle of a = 2 x 4 x rest."""
    along: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in _AXIS.findall(chosen):
        along.setdefault(name.strip(), []).append((int(before or 1), int(size or axes[name.strip()])))
    shape, kept, moved = [], [], []
    for name, whole in axes.items():
        done = 1
        for before, size in sorted(along.get(name, [])):
            if before > done:
                kept.append(len(shape))
                shape.append(before // done)
            moved.append(len(shape))
            shape.append(size)
            done = before * size
        if done < whole:
            kept.append(len(shape))
            shape.append(whole // done)
    count = math.prod(shape[axis] for axis in moved)
    return ids.reshape(shape or [1]).transpose([*kept, *moved] or [0]).reshape(-1, count).tolist()


def _between_slices(transfer: re.Match[str], shape: str) -> tuple[str, int, float, float, bool]:
    """A transfer to other slices, by the collective that it is a part of."""
    # The slices are listed as ``1,2`` or ``0:7``.
    ranges = ([int(number) for number in _WIDTH.findall(each)] for each in transfer[1].split(","))
    slices = sum(each[-1] - each[0] + 1 for each in ranges if each)
    size = _bytes(_parts(shape)[0])
    kind = _MEGASCALE_KINDS.get(transfer[2], "collective-permute")
    others = slices - 1
    times = {"all-reduce": 2 * others / slices, "all-gather": others, "collective-permute": 1.0}
    return kind, slices, 0.0, size * times.get(kind, others / slices), False


def _operands(line: str) -> list[str]:
    """The names in an instruction's parentheses."""
    match = _INSTRUCTION.match(line)
    return [] if match is None else _OPERAND.findall(line[match.end() :].partition(")")[0])


def _parts(shape: str) -> list[str]:
    """The elements of a tuple's type; [shape] for any other type."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, begin = [], 0, 1
    for at, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 or (depth == 1 and letter == ","):
            parts.append(shape[begin:at].strip())
            begin = at + 1
    return parts


def _bytes(shape: str) -> float:
    """Bytes of an array or of all arrays in a tuple, without padding."""
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _WIDTH.search(dtype)
        width = _BYTES.get(dtype, int(bits[0]) / 8 if bits else 0)
        total += width * math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    return total
