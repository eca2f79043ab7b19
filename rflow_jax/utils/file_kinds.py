"""What a file is in truth, by its first bytes: pointers, web pages and pickles in place of something else."""

from __future__ import annotations

import re
from pathlib import Path

from rflow_jax.errors import InputError

_LOOKED_AT = 512  # bytes
_PAGE_HEAD = 4096
_TITLE = re.compile(rb"<title[^>]*>([^<]*)", re.IGNORECASE)
_LFS = b"version https://git-lfs"
_WEB_PAGE = (b"<!doctype html", b"<html", b"<head", b"<?xml")


def stand_in(path: Path) -> str | None:
    """What a file is instead of the one of its name, and what to do: of a Git LFS pointer or a web page; else None."""
    return stand_in_of(_beginning(path))


def stand_in_of(start: bytes) -> str | None:
    """As :func:`stand_in`, of a file with this beginning."""
    if start.startswith(_LFS):
        return "a Git LFS pointer, not the file itself; run git lfs pull there, or download the file"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_WEB_PAGE):
        return "a web page, not the file itself; download it again, signed in if the site asks for it"
    return None


def mistaken_for_weights(path: Path) -> str | None:
    """As :func:`stand_in`, also of a GGUF file, a pickle, zeros or a text in place of a safetensors file."""
    start = _beginning(path)
    if found := stand_in_of(start):
        return found
    if start.startswith(b"GGUF"):
        return "a GGUF file, which only rflow convert flux reads, for transformers and T5"
    if start[8:9] == b"{":  # by the format, the header's first byte; before it anything may stand
        return None
    if start.startswith((b"PK\x03\x04", *(b"\x80" + bytes([version]) for version in range(2, 6)))):
        return "a PyTorch pickle under this name; take a safetensors file, or convert it to one"
    if start and not start.strip(b"\0"):
        return "nothing but zeros, as an interrupted download leaves them; download it again"
    if start.strip() and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        first = start.strip().splitlines()[0][:60].decode("ascii")
        return f"a text that begins with {first!r}; download the file again"
    return None


def web_page(content: bytes) -> str | None:
    """What to call a content that is a web page, with its title; else None."""
    start = content[:_PAGE_HEAD].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start.startswith(_WEB_PAGE) and not (start.startswith(b"<") and b"<html" in start):
        return None
    title = _TITLE.search(content[:_PAGE_HEAD])
    words = " ".join(title[1].decode("utf-8", "replace").split())[:80] if title else ""
    return f"a web page ({words!r})" if words else "a web page"


def require_true_files(folder: Path) -> None:
    """Raises InputError for a file in a model's folder, or below it, that is a Git LFS pointer or a web page."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (found := stand_in(path)):
            raise InputError(f"{path}: {found}")


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_LOOKED_AT)
