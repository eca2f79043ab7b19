"""Mutations of files: of their bytes, and of the values in JSON and YAML; the same for the same seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import yaml

_ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**30,
    "",
    "x",
    "../../x",
    "/dev/zero",
    "\x1b[31m\ud800",
    [],
    {},
    [None],
    {"": None},
]
_ODD += [[1, "a", {}], {"content": 1}, "a" * 3000, float("nan"), float("inf"), ["../x"], {"name": []}, [[[]]]]
_TOKENS = [
    b"null",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\x00",
    b"\xff\xfe",
    b"\x80",
    b"{}",
    b"[]",
]
_TOKENS += [b'"', b"\n", b"\\", b"&a ", b"*a", b"!!python/object:os.system ", b"\xe2\x80\xa8", b"-", b"\x1b[2J"]


def mutations(content: bytes, form: str, count: int, name: str) -> Iterator[bytes]:
    """Damaged versions of a file.

    Args:
        form: json, lines (of JSON), yaml or bytes.
        count: how many.
        name: of the reader; it is the seed.
    """
    rng = random.Random(name)
    structured = {"json": _of_json, "lines": _of_lines, "yaml": _of_yaml}.get(form)
    for _ in range(count):
        if structured is not None and rng.random() < 0.6:
            yield structured(content, rng)
        else:
            yield _of_bytes(content, rng)


def _of_bytes(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at, size = rng.randrange(len(damaged) + 1), rng.choice((1, 2, 8, 64))
        kind = rng.randrange(8)
        if kind == 0:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del damaged[at:]
        elif kind == 2:
            del damaged[at : at + size]
        elif kind == 3:
            damaged[at:at] = rng.choice(_TOKENS)
        elif kind == 4:
            damaged[at : at + size] = rng.choice(_TOKENS)
        elif kind == 5:
            damaged[at : at + size] = bytes(size)
        elif kind == 6:
            damaged[at:at] = damaged[max(0, at - size) : at]
        else:
            damaged = bytearray(rng.choice(_whole)(bytes(damaged)))
    return bytes(damaged)


_whole: list[Callable[[bytes], bytes]] = [
    lambda content: content.decode("latin-1").encode("utf-16"),
    lambda content: b"\xef\xbb\xbf" + content,
    lambda content: content + "é".encode("latin-1"),
    lambda content: content.replace(b"\n", b"\r\n"),
    lambda content: b"",
    lambda content: bytes(len(content)),
    lambda content: b"[" + content + b"]",
]


def _of_json(content: bytes, rng: random.Random) -> bytes:
    return _dumped(_changed(json.loads(content), rng), rng)


def _of_lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.choice([k for k, line in enumerate(lines) if line.strip()])
    lines[at] = _of_json(lines[at], rng)
    return b"\n".join(lines)


def _of_yaml(content: bytes, rng: random.Random) -> bytes:
    changed = _changed(yaml.safe_load(content), rng)
    try:
        return yaml.safe_dump(changed, sort_keys=False).encode("utf-8", "replace")
    except yaml.YAMLError:
        return b""


def _dumped(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace")
    return text.replace(b'": ', b'": 1, "": ', 1) if rng.random() < 0.05 else text


def _changed(value: Any, rng: random.Random) -> Any:
    """A value with one or two of its parts replaced, removed, renamed or doubled."""
    whole = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(whole))
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind < 4 or holder is whole:
            holder[key] = copy.deepcopy(rng.choice(_ODD))
        elif kind == 4:
            del holder[key]
        elif isinstance(holder, dict):
            holder[str(key) + "_"] = holder.pop(key)
        else:
            holder.append(copy.deepcopy(holder[key]))
    return whole[0]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) below."""
    inner = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(inner)[:200]:
        yield holder, key
        if isinstance(value, dict | list):
            yield from _places(value)
