"""Where the data stands, of all processes: one of them keeps it for all."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from rflow_jax.data.stream.loader import merge_positions


def gather_position(position: dict[str, Any]) -> dict[str, Any]:
    """The position of all processes' data; all must call it, and all get the same.

    Only a stream's processes each have a place of their own.
    """
    if jax.process_count() == 1 or "streams" not in position:
        return position
    text = np.frombuffer(json.dumps(position).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.asarray([text.size]))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(process_allgather(padded)).reshape(len(sizes), -1)
    return merge_positions([json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)])
