"""Names of a PyTorch checkpoint <-> names of our parameters, as tables that must be bijections.

A table is a list of :class:`Rule`, one for each kind of module: ``flax`` is a regular expression over *our* module
paths (``double_blocks.7.attn.to_q``), ``torch`` the name of the module in the checkpoint. The last part of a name
follows from :data:`LEAVES` (``kernel`` <-> ``weight``). Several of our parameters with the same ``torch`` name are
fused in the checkpoint: they are its row blocks, in the order of the rules.

The plan made from a table serves reading and writing: sizes come from our parameters, never from a literal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.weights.safetensors_io import TensorFiles

_INTEGERS = "iub"  # NumPy's kinds, booleans among them
# Our leaf -> the checkpoint's leaf.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclass(frozen=True)
class Rule:
    """One kind of module.

    Attributes:
        flax: regular expression that must match our whole module path.
        torch: the checkpoint's module, a template for ``re.Match.expand`` (``\\1`` is the first group).
        via: a conversion besides the transposition of kernels: ``swap_halves`` exchanges the two halves of the rows
            (scale and shift), ``pointwise`` reads a 1 x 1 convolution as a linear.
    """

    flax: str
    torch: str
    via: str = ""


@dataclass(frozen=True)
class KeyMapping:
    """Rules, and patterns of checkpoint keys to ignore (tied copies, constants)."""

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    prefix: str = ""  # in front of every key of the checkpoint
    leaves: Mapping[str, str] = field(default_factory=lambda: LEAVES, hash=False)  # our leaf -> theirs

    def module(self, path: str) -> tuple[int, str, str]:
        """(index of the rule, the checkpoint's module, the rule's ``via``) of one of our modules."""
        hits = [(k, m.expand(r.torch), r.via) for k, r in enumerate(self.rules) if (m := re.fullmatch(r.flax, path))]
        if len(hits) != 1:
            raise LookupError(f"table {self.name}: {len(hits)} rules match our module {path!r}, must be one")
        return hits[0]

    def ignores(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.ignore)


@dataclass(frozen=True)
class TensorTarget:
    """One of our parameters, as part of a checkpoint's tensor."""

    path: str  # dotted: "double_blocks.0.attn.to_q.kernel"
    shape: tuple[int, ...]  # ours
    via: str = ""

    @property
    def their_shape(self) -> tuple[int, ...]:
        if self.is_kernel and len(self.shape) == 2:
            rows = self.shape[::-1]
            return (*rows, 1, 1) if self.via == "pointwise" else rows
        if self.is_kernel and len(self.shape) == 4:
            h, w, c_in, c_out = self.shape
            return (c_out, c_in, h, w)
        if self.is_kernel and len(self.shape) == 5:
            return (self.shape[-1], *self.shape[:-1])
        return self.shape

    @property
    def is_kernel(self) -> bool:
        return self.path.endswith(".kernel") or self.path == "kernel"

    def to_ours(self, tensor: Any) -> Any:
        """The checkpoint's rows (numpy or JAX array) -> our layout: [out, in] -> [in, out], OIHW -> HWIO.

        Kernels of five axes are those of patches, which flatten channels first: OITHW -> ITHWO.
        """
        tensor = self._via(tensor)
        if self.is_kernel and len(self.shape) == 2:
            return tensor.reshape(self.shape[::-1]).transpose()
        if self.is_kernel and len(self.shape) == 4:
            return tensor.transpose(2, 3, 1, 0)
        if self.is_kernel and len(self.shape) == 5:
            return tensor.transpose(1, 2, 3, 4, 0)
        return tensor

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_ours`."""
        if self.is_kernel and len(self.shape) == 2:
            value = value.transpose()
        elif self.is_kernel and len(self.shape) == 4:
            value = value.transpose(3, 2, 0, 1)
        elif self.is_kernel and len(self.shape) == 5:
            value = value.transpose(4, 0, 1, 2, 3)
        return np.ascontiguousarray(self._via(value.reshape(self.their_shape)))

    def _via(self, tensor: Any) -> Any:
        if self.via != "swap_halves":
            return tensor
        half = tensor.shape[0] // 2
        # A reshape and a flip work on both numpy and JAX arrays.
        return tensor.reshape(2, half, *tensor.shape[1:])[::-1].reshape(tensor.shape)


@dataclass
class MappingPlan:
    """Every tensor of a checkpoint with its parameters, in row order."""

    table: KeyMapping
    entries: dict[str, tuple[TensorTarget, ...]] = field(default_factory=dict)

    def their_shape(self, key: str) -> tuple[int, ...]:
        first, *rest = (t.their_shape for t in self.entries[key])
        return (first[0] + sum(shape[0] for shape in rest), *first[1:])

    def check_files(self, files: TensorFiles) -> None:
        """Raises :class:`InputError`, naming the file, unless these are the plan's tensors, in floating point."""
        self.check(files.shapes, files.source, files.home_of)
        for key in self.entries:
            if (dtype := files[key].dtype).kind in _INTEGERS:
                raise InputError(f"{files.home_of(key)}: {key} is stored as {dtype}; expected floating-point numbers")

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], source: str, home_of: Callable[[str], str] | None = None
    ) -> None:
        """Raises :class:`InputError` unless ``shapes`` are exactly those of the plan's tensors.

        Args:
            source: the origin of the shapes, for messages.
            home_of: key -> the origin of that tensor, for messages.
        """
        home_of = home_of or (lambda key: source)
        found = {key for key in shapes if not self.table.ignores(key)}
        missing, unknown = self.entries.keys() - found, found - self.entries.keys()
        if missing:
            raise InputError(f"{source}: {_some(missing)} missing; is it a {self.table.name} checkpoint of this size?")
        if unknown:
            home = home_of(min(unknown))
            raise InputError(f"{home}: {_some(unknown)} not known to a {self.table.name} checkpoint of this size")
        for key in self.entries:
            if tuple(shapes[key]) != self.their_shape(key):
                want, got = list(self.their_shape(key)), list(shapes[key])
                raise InputError(f"{home_of(key)}: {key} has shape {got}, the configuration asks for {want}")

    def split(self, key: str, tensor: Any) -> Iterator[tuple[TensorTarget, Any]]:
        """The parameters of one tensor, as row blocks still in the checkpoint's layout."""
        targets = self.entries[key]
        start = 0
        for target in targets:
            rows = target.their_shape[0]
            yield target, tensor if len(targets) == 1 else tensor[start : start + rows]
            start += rows

    def join(self, key: str, values: Mapping[str, Any]) -> np.ndarray:
        """The checkpoint's tensor from our parameters (by path)."""
        blocks = [t.to_theirs(np.asarray(values[t.path])) for t in self.entries[key]]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def plan(table: KeyMapping, shapes: Mapping[str, tuple[int, ...]]) -> MappingPlan:
    """Lays a table over our parameters.

    Args:
        shapes: dotted path of each of our parameters -> its shape.

    Raises:
        LookupError: a module matches no rule, or more than one (a mistake in the table).
    """
    grouped: dict[str, list[tuple[int, TensorTarget]]] = {}
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition(".")
        order, theirs, via = table.module(module)
        key = f"{table.prefix}{theirs}.{table.leaves[leaf]}"
        grouped.setdefault(key, []).append((order, TensorTarget(path, tuple(shape), via)))
    result = MappingPlan(table)
    for key, members in grouped.items():
        members.sort(key=lambda member: member[0])
        result.entries[key] = tuple(target for _, target in members)
    return result


def _some(keys: Iterable[str], show: int = 3) -> str:
    """'a, b, c and 7 more keys'."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - show} more keys" if len(ordered) > show else ""
    return ", ".join(ordered[:show]) + more
