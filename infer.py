"""``python infer.py COMMAND``: the command ``rflow``, in a checkout."""

from rflow_jax.commands.main import console

if __name__ == "__main__":
    console()
