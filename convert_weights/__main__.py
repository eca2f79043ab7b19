"""``python -m convert_weights``: the commands ``rflow convert``, and ``verify`` for ``rflow parity``, in a checkout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rflow_jax.commands import main as rflow
from rflow_jax.utils import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; raises InputError for a bad command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    return rflow.main(["parity", *words[1:]] if words[:1] == ["verify"] else ["convert", *words])


if __name__ == "__main__":
    sys.exit(cli.run(main))
