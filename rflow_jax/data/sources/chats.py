"""Chats with pictures to learn answers from: JSON lines in LLaMA-Factory's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rflow_jax.data.records import read_image
from rflow_jax.errors import InputError
from rflow_jax.utils.json_files import fingerprint_of, read_lines

PICTURE = "<image>"  # stands for the next picture in a message
ROLES = ("system", "user", "assistant")


class Chat(NamedTuple):
    """One conversation.

    Attributes:
        key: what to call it in messages.
        messages: (role, text) of each.
        images: encoded pictures, one for each ``<image>`` in the texts.
    """

    key: str
    messages: tuple[tuple[str, str], ...]
    images: tuple[bytes, ...]


class _Line(NamedTuple):
    where: str
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
        """Reads the lines, and none of the pictures.

        Raises:
            InputError: a line is not usable; names it.
        """
        lines = tuple(_line(where, record) for where, record in read_lines(path))
        return cls(path.parent, lines, fingerprint_of(path))

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> Chat:
        """Reads one chat; raises RecordError where a picture cannot be read."""
        line = self.lines[index]
        return Chat(
            line.where, line.messages, tuple(read_image(self.folder / name, line.where) for name in line.images)
        )


def _line(where: str, record: Mapping[str, Any]) -> _Line:
    messages, images = record.get("messages"), record.get("images") or []
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages is {messages!r}: give a list of role and content")
    told = tuple(_message(where, message) for message in messages)
    if not any(role == "assistant" for role, _ in told):
        raise InputError(f"{where}: no message of the assistant, so there is nothing to learn")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise InputError(f"{where}: images is {images!r}: give a list of files")
    asked = sum(text.count(PICTURE) for _, text in told)
    if asked != len(images):
        raise InputError(f"{where}: {PICTURE} stands {asked} times in the messages, for {len(images)} images")
    return _Line(where, told, tuple(images))


def _message(where: str, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise InputError(f"{where}: {str(message)[:60]!r} is no message: give role and content")
    if message.get("role") not in ROLES:
        raise InputError(f"{where}: role is {message.get('role')!r}: give {', '.join(ROLES)}")
    return message["role"], message["content"]
