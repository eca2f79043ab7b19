"""``python -m convert_weights``: the commands ``rflow convert``, and ``verify`` for ``rflow parity``, in a checkout."""

import sys

from rflow_jax.commands.main import main
from rflow_jax.utils import cli

if __name__ == "__main__":
    words = sys.argv[1:]
    argv = ["parity", *words[1:]] if words[:1] == ["verify"] else ["convert", *words]
    sys.exit(cli.run(lambda: main(argv)))
