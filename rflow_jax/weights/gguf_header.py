"""The header of a GGUF file, walked through before a library believes its counts and lengths."""

from __future__ import annotations

import math
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_LONGEST = 2**26  # bytes of a header; the vocabulary of a text encoder takes one or two million
_MOST_VALUES = 2**20  # of all lists
_LONGEST_NAME = 2000  # letters
_AXES = 8  # of a tensor; ggml has 4
_DEEPEST = 4  # lists within lists
_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = b"general.alignment"


def fault_of_header(file: Path) -> str:
    """What is wrong with a header's counts, lengths and sizes; empty if nothing is."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        header = _Header(opened.read(_LONGEST), size)
    try:
        header.check()
    except _Fault as fault:
        return str(fault)
    return ""


class _Fault(Exception):
    """What is wrong with a header."""


class _Header:
    """The beginning of a file, and how far it is read."""

    def __init__(self, content: bytes, size: int):
        self._content, self._size, self._at = content, size, 0
        self._left = _MOST_VALUES

    def check(self) -> None:
        """Raises _Fault for a header that cannot be right."""
        if len(self._content) < 24:
            raise _Fault(f"only {len(self._content)} bytes")
        if self._take(4, "the magic") != _MAGIC:
            raise _Fault("it does not begin with GGUF")
        if (version := self._number("I", "the version")) not in (2, 3):
            raise _Fault(f"version {version}, where 2 and 3 are known")
        tensors, pairs = self._count("tensors", 24), self._count("settings", 12)
        for k in range(pairs):
            what = f"setting {k + 1} of {pairs}"
            name = self._text(f"the name of {what}")
            kind = self._number("I", what)
            start = self._at
            self._value(kind, what)
            if name == _ALIGNMENT:
                self._require_alignment(kind, start)
        for k in range(tensors):
            self._tensor(f"tensor {k + 1} of {tensors}")

    def _take(self, length: int, what: str) -> bytes:
        end = self._at + length
        if end > len(self._content):
            raise _Fault(f"{what} takes {length:,} bytes, and {len(self._content) - self._at:,} are left of the header")
        taken, self._at = self._content[self._at : end], end
        return taken

    def _number(self, form: str, what: str) -> int:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(form), what))[0]

    def _count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self._number("Q", f"the number of {what}")
        if count * least > self._size:
            raise _Fault(f"{count:,} {what}, in a file of {self._size:,} bytes")
        return count

    def _text(self, what: str, longest: int = _LONGEST_NAME) -> bytes:
        length = self._number("Q", f"the length of {what}")
        if length > longest:
            raise _Fault(f"{what} has {length:,} letters")
        return self._take(length, what)

    def _value(self, kind: int, what: str, depth: int = 0) -> None:
        self._left -= 1
        if kind in _NUMBERS:
            self._take(_NUMBERS[kind], what)
        elif kind == _STRING:
            self._text(what, _LONGEST)
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, count = self._number("I", what), self._number("Q", what)
            if count > self._left:
                raise _Fault(f"{what} is a list of {count:,}, and {self._left:,} values are read at most")
            for _ in range(count):
                self._value(inner, what, depth + 1)
        else:
            raise _Fault(f"{what} is of type {kind}, or too deep in lists")

    def _require_alignment(self, kind: int, start: int) -> None:
        found = int.from_bytes(self._content[start : start + 4], "little") if kind == _UINT32 else 0
        if not 1 <= found <= 2**20 or found & (found - 1):
            raise _Fault(f"an alignment of {found:,} bytes")

    def _tensor(self, what: str) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._text(f"the name of {what}").decode("utf-8", "replace")
        if (axes := self._number("I", what)) > _AXES:
            raise _Fault(f"{name} has {axes:,} axes")
        shape = [self._number("Q", what) for _ in range(axes)]
        kind, offset = self._number("I", what), self._number("Q", what)
        if kind not in set(GGMLQuantizationType):
            raise _Fault(f"{name} is stored in type {kind}, which is not known")
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if offset + math.prod(shape) // block * nbytes > self._size:
            raise _Fault(f"{name} has the shape {shape} at byte {offset:,}, in a file of {self._size:,} bytes")
