"""``python train.py``: the command ``rflow train``, in a checkout."""

import sys

from rflow_jax.commands.main import main
from rflow_jax.utils import cli

if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(["train", *sys.argv[1:]])))
