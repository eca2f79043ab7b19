"""``python -m rflow_jax.parallel.aot``: compiles a recipe for TPUs without a TPU, see :mod:`rflow_jax.aot`."""

from rflow_jax import cli
from rflow_jax.aot.command import main

if __name__ == "__main__":
    raise SystemExit(cli.run(main))
