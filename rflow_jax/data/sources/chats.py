"""Chats with images for supervised fine-tuning: JSON lines in LLaMA-Factory's format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rflow_jax.data.records import read_image
from rflow_jax.errors import InputError
from rflow_jax.utils.files import fingerprint_of
from rflow_jax.utils.json_files import read_json_lines

PICTURE = "<image>"  # placeholder of the next image in a message
ROLES = ("system", "user", "assistant")


class ChatRecord(NamedTuple):
    """One conversation.

    Attributes:
        key: the name of the chat in error messages.
        messages: (role, text) of each.
        images: encoded, one for each ``<image>`` in the texts.
    """

    key: str
    messages: tuple[tuple[str, str], ...]
    images: tuple[bytes, ...]


def chat_line(turns: Iterable[tuple[str, str]], image: str) -> str:
    """A chat about an image, as a line of such a file.

    Args:
        turns: questions, the first with :data:`PICTURE` in it, and their answers.
        image: its path, relative to the file.
    """
    said = [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    messages = [{"role": role, "content": text} for role, text in said]
    return json.dumps({"messages": messages, "images": [image]}, ensure_ascii=False) + "\n"


class _Line(NamedTuple):
    source: str
    messages: tuple[tuple[str, str], ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class ChatFile:
    """The chats of a file of JSON lines: ``messages`` with ``role`` and ``content``, and ``images`` beside the file."""

    folder: Path
    lines: tuple[_Line, ...]
    fingerprint: str

    @classmethod
    def open(cls, path: Path) -> ChatFile:
        """Reads the lines but not the images; raises InputError, naming the line, if one is unusable."""
        lines = tuple(_line(source, record) for source, record in read_json_lines(path, "file of chats"))
        return cls(path.parent, lines, fingerprint_of(path))

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> ChatRecord:
        """Reads one chat; raises RecordError if an image cannot be read."""
        line = self.lines[index]
        images = tuple(read_image(self.folder / name, line.source) for name in line.images)
        return ChatRecord(line.source, line.messages, images)


def _line(source: str, record: Mapping[str, Any]) -> _Line:
    messages, images = record.get("messages"), record.get("images") or []
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{source}: messages is {messages!r}: give a list of role and content")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"{source}: {str(message)[:60]!r} is not a message: give role and content")
        if message.get("role") not in ROLES:
            raise InputError(f"{source}: role is {message.get('role')!r}: give {', '.join(ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{source}: no message of the assistant, so there is nothing to learn")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise InputError(f"{source}: images is {images!r}: give a list of files")
    asked = sum(message["content"].count(PICTURE) for message in messages)
    if asked != len(images):
        raise InputError(f"{source}: {PICTURE} occurs {asked} times in the messages, for {len(images)} images")
    return _Line(source, tuple((message["role"], message["content"]) for message in messages), tuple(images))
