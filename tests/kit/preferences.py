"""Generated pairs as JSON lines: pictures of make_genref, of which one shows what the prompt says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rflow_jax.data.sources.tar import open_tars
from rflow_jax.testing.make_genref import make_genref


def make_pairs(folder: Path, count: int, *, seed: int = 0, **fields: Any) -> Path:
    """Writes ``pairs.jsonl`` with pictures beside it, the preferred one now A and now B; returns the file.

    Args:
        fields: of every line, beside or instead of its own; None leaves one out.
    """
    shards = folder / "shards"
    make_genref(shards, shards=1, samples=count, seed=seed)
    source = open_tars(str(shards), cache=folder / "index")
    lines = []
    for subset, records in source.counts.items():
        for index in range(records):
            record = source.read(subset, index)
            for name, content in (("good", record.good_image), ("bad", record.bad_image)):
                (folder / f"{record.key}_{name}.jpg").write_bytes(content)
            a, b, label, scores = ("good", "bad", "A", (5, 2)) if len(lines) % 2 else ("bad", "good", "B", (2, 5))
            line = {"prompt": record.prompt, "image_a": f"{record.key}_{a}.jpg", "image_b": f"{record.key}_{b}.jpg"}
            line |= {"label": label, "score_a": scores[0], "score_b": scores[1]} | fields
            lines.append({key: value for key, value in line.items() if value is not None})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
