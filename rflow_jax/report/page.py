"""The HTML page: one file that needs only the searches' images beside it."""

import base64
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rflow_jax.report import charts
from rflow_jax.report import curves as names
from rflow_jax.report.curves import OVERALL, curve, numbers_of_images, tags
from rflow_jax.report.runs import Picture, Prompt, SearchRun, read_runs
from rflow_jax.report.templates import render_template, template_text
from rflow_jax.utils.atomic_io import write_file


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes ``index.html`` about searches and returns where it is.

    Args:
        runs: folders of searches; several are shown side by side.
        out: folder of the page; without it the first search's.

    Raises:
        InputError: a folder holds no search, or something in it cannot be read.
    """
    return write_page(read_runs(runs), out)


def write_page(runs: Sequence[SearchRun], out: Path | None = None) -> Path:
    """As :func:`write_report`, for searches that have been read."""
    folder = runs[0].folder if out is None else out
    page = folder / "index.html"
    # A name that is not Unicode text (Linux allows it) must not stop the report.
    write_file(page, render(runs, folder).encode("utf-8", "replace"))
    return page


def render(runs: Sequence[SearchRun], folder: Path) -> str:
    """The page's HTML, for a page that lies in ``folder``."""
    script = "".join(template_text(name) for name in ("search.js", "page.js"))
    return render_template(
        "page.html",
        names=names.names(runs),
        runs=[_facts(run) for run in runs],
        groups=[_curves(runs, decides) for decides in (False, True) if _of(runs, decides)],
        data=page_data(runs, folder),
        style=template_text("chart.css") + template_text("page.css"),
        script=script,
        # The browser runs this script and no other, should a text ever slip through.
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
    )


def page_data(runs: Sequence[SearchRun], folder: Path) -> dict[str, Any]:
    """The data of the page's script: all that the list shows, and each prompt's details in a packed form."""
    matched: dict[tuple[str, int], dict[int, Prompt]] = {}
    for number, run in enumerate(runs):
        seen: Counter[str] = Counter()
        for prompt in run.prompts:
            # The same prompt has the same words; a prompt file may hold it more than once.
            matched.setdefault((prompt.text, seen[prompt.text]), {})[number] = prompt
            seen[prompt.text] += 1
    bases = [_url(os.path.relpath(run.folder, folder)) + "/" for run in runs]
    about = zip(names.names(runs), bases, runs, strict=True)
    numbers = numbers_of_images(runs)
    return {
        "numbers": numbers,
        "runs": [{"name": name, "base": base, "verified": run.verified} for name, base, run in about],
        "prompts": [_entry(of_run, len(runs), numbers) for of_run in matched.values()],
    }


def _entry(of_run: dict[int, Prompt], runs: int, numbers: Sequence[int]) -> dict[str, Any]:
    prompts = [of_run.get(number) for number in range(runs)]
    first = next(iter(of_run.values()))
    pictures = [prompt and [_details(picture, prompt.folder) for picture in prompt.pictures] for prompt in prompts]
    text = json.dumps(pictures, separators=(",", ":"), allow_nan=False)
    return {
        "text": first.text,
        "tag": first.tag,
        "runs": [prompt and _overview(prompt, numbers) for prompt in prompts],
        # Compressed: the texts of 553 prompts with 32 images are tens of megabytes otherwise.
        "packed": base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii"),
    }


def _overview(prompt: Prompt, numbers: Sequence[int]) -> dict[str, Any]:
    best_of_first = [prompt.best(number) for number in numbers]
    shown = dict.fromkeys([0, *(k for k in best_of_first if k is not None)])
    return {
        "count": len(prompt.pictures),
        "bestOfFirst": best_of_first,
        "chosen": prompt.best(),
        "looks": {k: _look(prompt.pictures[k], prompt.folder) for k in shown},
    }


def _look(picture: Picture, folder: str) -> dict[str, Any]:
    look: dict[str, Any] = {"src": None, "score": None}
    if picture.size:
        look = {"src": _url(f"{folder}/{picture.file}"), "width": picture.size[0], "height": picture.size[1]}
    if picture.verdict and picture.verdict.scored:
        look |= {"score": picture.verdict.score, "label": picture.verdict.label, "rank": picture.verdict.rank}
    return look


def _details(picture: Picture, folder: str) -> dict[str, Any]:
    verdict = picture.verdict
    details = {
        **_look(picture, folder),
        "round": picture.round,
        "branch": picture.branch,
        "stage": picture.stage,
        "parent": picture.parent,
        "refined": picture.refined_prompt,
        "reflection": picture.reflection,
        "problems": _problems(picture),
        "explanation": verdict.explanation if verdict else None,
    }
    return {key: value for key, value in details.items() if value not in (None, "", [])}


def _problems(picture: Picture) -> list[str]:
    if picture.error is not None:  # the verdict says the same
        return [*picture.text_errors, f"could not be made: {picture.error}"]
    return [*picture.text_errors, *([picture.verdict.error] if picture.verdict and picture.verdict.error else [])]


def _url(path: str) -> str:
    return quote(os.fsencode(Path(path).as_posix()))


def _facts(run: SearchRun) -> dict[str, Any]:
    most = run.most
    ends = curve(run, OVERALL, [1, most]).values if run.verified else (None, None)
    begun = len(run.prompts) + run.running
    return {
        "strategy": names.strategy(run),
        "model": names.model(run),
        "verifier": names.verifier(run),
        "prompts": f"{len(run.prompts):,}",
        "running": f"{run.running:,} of {names.count(begun, 'prompt')} still running" if run.running else "",
        "images": f"{run.images:,}",
        "unscored": f"{run.unscored:,}" if run.verified else "–",
        "unmade": f"{run.unmade:,}" if run.unmade else "",
        "seconds": names.duration(run.usage["seconds"]) if "seconds" in run.usage else "",
        "cost": f"${run.usage['cost']:,.2f}" if "cost" in run.usage else "",
        "most": names.count(most, "image"),
        "from": names.value(ends[0], run.decides),
        "to": names.value(ends[1], run.decides),
        "decides": run.decides,
    }


def _of(runs: Sequence[SearchRun], decides: bool) -> list[int]:
    return [number for number, run in enumerate(runs) if run.verified and run.decides == decides]


def _curves(runs: Sequence[SearchRun], decides: bool) -> dict[str, Any]:
    """The charts of the runs whose verifiers decide, or of those whose verifiers grade."""
    chosen, all_names = _of(runs, decides), names.names(runs)
    numbers = numbers_of_images(runs[number] for number in chosen)
    found = {tag: [curve(runs[k], tag, numbers) for k in chosen] for tag in [OVERALL, *tags([runs[k] for k in chosen])]}

    def draw(tag: str, style: charts.Style, among: Sequence[str]) -> charts.Chart:
        heights = [v for name in among for one in found[name] for v in one.values if v is not None]
        series = [charts.Series(k, all_names[k], one.values) for k, one in zip(chosen, found[tag], strict=True)]
        return charts.chart(tag.replace("_", " "), numbers, series, heights, style, decides)

    small = [tag for tag in found if tag != OVERALL]
    return {
        "decides": decides,
        "verifiers": sorted({names.verifier(runs[k]) for k in chosen}),
        "wide": draw(OVERALL, charts.WIDE, [OVERALL]),
        "narrow": draw(OVERALL, charts.NARROW, [OVERALL]),
        # One axis for all tags, so that they compare.
        "small": [(tag.replace("_", " "), draw(tag, charts.SMALL, small)) for tag in small],
        "numbers": numbers,
        "rows": [
            (tag.replace("_", " "), k, one.prompts, [names.value(v, decides) for v in one.values])
            for tag in [*small, OVERALL]
            for k, one in zip(chosen, found[tag], strict=True)
        ],
    }
