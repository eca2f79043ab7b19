"""Generate images, and search over them: ``python infer.py --help``."""

from rflow_jax import cli
from rflow_jax.generate import GenerateConfig, generate
from rflow_jax.search.command import RunConfig, noise, reflect
from rflow_jax.search.config import SearchConfig
from rflow_jax.settings import Settings

COMMANDS = {
    "generate": cli.Command("Generate images of one prompt.", (GenerateConfig, Settings), generate),
    "noise": cli.Command("Search over images from fresh noise.", (SearchConfig, RunConfig), noise),
    "reflect": cli.Command("Correct the best images round by round.", (SearchConfig, RunConfig), reflect),
}


def main() -> int | None:
    """The command line."""
    return cli.dispatch(COMMANDS, "ReflectionFlow: generate images, and search over them.")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
