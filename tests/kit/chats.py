"""Generated chats as JSON lines, with one picture, two or none, and several turns."""

from __future__ import annotations

import json
from pathlib import Path

from tests.kit.pictures import picture

TURNS = (
    (("user", "<image>What is it?"), ("assistant", "A bench.")),
    (
        ("system", "Be brief."),
        ("user", "Compare <image> with <image>, please."),
        ("assistant", "The first is larger."),
        ("user", "Why?"),
        ("assistant", "It shows more."),
    ),
    (("user", "Say something."), ("assistant", "Something, and a longer sentence than the others have.")),
    (("user", "A photo of two clocks <image> and what is wrong with it"), ("assistant", "Add a second clock.")),
)


def make_chats(folder: Path) -> Path:
    """Writes ``chats.jsonl`` with pictures beside it; returns the file."""
    lines = []
    for number, turns in enumerate(TURNS):
        count = sum(text.count("<image>") for _, text in turns)
        names = [f"{number}_{k}.png" for k in range(count)]
        for k, name in enumerate(names):
            picture(60 + 30 * number, 90 - 20 * k, 10 * number + k).save(folder / name)
        messages = [{"role": role, "content": text} for role, text in turns]
        lines.append(json.dumps({"messages": messages, "images": names}) + "\n")
    file = folder / "chats.jsonl"
    file.write_text("".join(lines))
    return file
