"""Where the data stands, of all processes: one of them keeps it for all."""

from __future__ import annotations

import json
from typing import Any

import jax

from rflow_jax.data.stream.loader import merge_positions
from rflow_jax.parallel.processes import gather_texts


def gather_position(position: dict[str, Any]) -> dict[str, Any]:
    """The position of all processes' data; all must call it, and all get the same.

    Only a stream's processes each have a place of their own.
    """
    if jax.process_count() == 1 or "streams" not in position:
        return position
    return merge_positions([json.loads(text) for text in gather_texts(json.dumps(position))])
