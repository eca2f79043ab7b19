"""The curves as a table for the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from rflow_jax.report.curves import OVERALL, curve, numbers_of_images, tags
from rflow_jax.report.names import names, value
from rflow_jax.report.runs import Run


def summary_table(runs: Sequence[Run]) -> Table:
    """The mean best score after 1, 2, 4, ... images for each tag and overall, a line a run.

    For a verifier that decides it is the share of prompts whose best image is a "yes".
    """
    numbers = numbers_of_images(runs)
    several = len(runs) > 1
    table = Table(title="Mean best score by number of images", title_justify="left", box=SIMPLE, collapse_padding=True)
    if any(run.decides for run in runs):
        table.title = "Prompts whose best image is a yes, by number of images"
    if any(run.decides for run in runs) and not all(run.decides for run in runs):
        table.title = "Mean best score, or prompts whose best image is a yes (%), by number of images"
    table.add_column("tag", no_wrap=True)
    if several:
        table.add_column("run", overflow="fold")
    for column in ("prompts", "images", *map(str, numbers), "unscored"):
        table.add_column(column, justify="right", no_wrap=True)
    for tag in [*tags(runs), OVERALL]:
        for name, run in zip(names(runs), runs, strict=True):
            found = curve(run, tag, numbers)
            # Text, not markup: a tag or a folder's name may hold brackets.
            row = [tag.replace("_", " "), *([name] if several else []), str(found.prompts), str(found.images)]
            row += [value(mean, run.decides) for mean in found.values]
            row += [str(found.unscored) if run.verified else "–"]
            table.add_row(*map(Text, row), style="bold" if tag == OVERALL else None)
        if several:
            table.add_section()
    return table
