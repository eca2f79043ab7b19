"""Generate images, search over them, and score them: ``python infer.py --help``."""

from collections.abc import Callable
from importlib import import_module

from rflow_jax import cli
from rflow_jax.generate import GenerateConfig, generate
from rflow_jax.pairs import PairsConfig, pairs
from rflow_jax.report import ReportConfig, report
from rflow_jax.score import ScoreConfig, score
from rflow_jax.search.config import RunConfig, SearchConfig
from rflow_jax.search.nfe import FilterConfig, filter_nfe
from rflow_jax.settings import Settings

SEARCH = (SearchConfig, RunConfig)


def _search(name: str) -> Callable[[SearchConfig, RunConfig], int]:
    """The command of a search, imported when it is run: --help need not wait for JAX."""
    return lambda config, where: getattr(import_module("rflow_jax.search.command"), name)(config, where)


COMMANDS = {
    "generate": cli.Command("Generate images of one prompt.", (GenerateConfig, Settings), generate),
    "noise": cli.Command("Search over images from fresh noise.", SEARCH, _search("noise")),
    "noise-prompt": cli.Command("Refine each branch's prompt from image to image.", SEARCH, _search("noise_prompt")),
    "reflect": cli.Command("Correct the best images round by round.", SEARCH, _search("reflect")),
    "report": cli.Command("Show searches on one page.", (ReportConfig,), report, "runs"),
    "filter": cli.Command("Choose the best of a search's first k images.", (FilterConfig,), filter_nfe, "folder"),
    "score": cli.Command("Score images that are there already.", (ScoreConfig,), score, "images", SEARCH),
    "pairs": cli.Command("Correct known bad images, beside the good ones.", (PairsConfig, Settings), pairs, "file"),
}


def main() -> int | None:
    """The command line."""
    return cli.dispatch(COMMANDS, "ReflectionFlow: generate images, and search over them.")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
