"""``rflow score``."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rflow_jax.errors import serving
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.scoring.judging import judge, scores_follow_from
from rflow_jax.scoring.results import ImageResult, Results, shown
from rflow_jax.scoring.targets import ScoreConfig, Target, find_targets
from rflow_jax.search.config import RunConfig, SearchConfig
from rflow_jax.utils.cli import Command
from rflow_jax.utils.images import picture_bytes
from rflow_jax.utils.progress import count_progress
from rflow_jax.utils.shown import one_line
from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.config import EnsembleVerifierConfig
from rflow_jax.verifiers.ranking import with_ensemble_scores

NONE = "-"  # stands for no score and no label


def command(name: str, argv: Sequence[str]) -> Command:
    """The command, which takes the verifier from a search's YAML file."""
    return Command((ScoreConfig,), score, ("images",), (SearchConfig, RunConfig), ("verifier", "probe"))


def score(config: ScoreConfig) -> int:
    """Prints a line an image: score, label, path, and what went wrong; then a summary on standard error.

    Returns:
        The exit status: 1 if an image could not be scored.

    Raises:
        InputError: an image or a prompt that is named and not there, a verifier or a file that is not usable.
    """
    began = time.monotonic()
    targets = find_targets(config)
    out = None if config.out is None else Path(config.out)
    with Results(out, {} if out is None else scores_follow_from(config.verifier)) as results:
        meter = UsageTracker()
        found = _rated(_scored(config, targets, results, meter))
        results.finish(found)
    if isinstance(config.verifier, EnsembleVerifierConfig):
        _Lines(targets).print(dict(enumerate(found)))
    unscored = sum(not one.verdict.scored for one in found)
    print(_summary(found, meter.snapshot(), time.monotonic() - began), file=sys.stderr)
    return 1 if unscored else 0


def _scored(config: ScoreConfig, targets: Sequence[Target], results: Results, meter: UsageTracker) -> list[ImageResult]:
    found: dict[int, ImageResult] = {}
    for k, target in enumerate(targets if results and not config.again else ()):
        try:
            sha256 = hashlib.sha256(picture_bytes(target.path)).hexdigest()
        except (OSError, ValueError):
            continue  # reported when it is scored
        if (known := results.known(target, sha256)) is not None:
            found[k] = known
    todo = {k: target for k, target in enumerate(targets) if k not in found}
    # The scores of an ensemble are known when all are. Otherwise lines on a terminal are the progress.
    at_end = isinstance(config.verifier, EnsembleVerifierConfig)
    lines = _Lines(() if at_end else targets)
    with count_progress(show=at_end or not sys.stdout.isatty()) as progress:
        task = progress.add_task("score", total=len(targets), completed=len(found))
        lines.print(found)
        for k, one in _judged(config, todo, results, meter):
            results.add(one)
            found[k] = one
            progress.advance(task)
            lines.print(found)
    return [found[k] for k in range(len(targets))]


def _judged(
    config: ScoreConfig, todo: Mapping[int, Target], results: Results, meter: UsageTracker
) -> Iterator[tuple[int, ImageResult]]:
    rest = {k: target for k, target in todo.items() if target.error is None}
    with serving("verifier", settings=True):
        verifier = make_verifier(config.verifier, meter, probe=config.probe) if rest else None
    results.begin()  # only now: a verifier that cannot be made leaves no file
    for k in todo.keys() - rest.keys():
        yield k, ImageResult(todo[k], None, Verdict(None, error=todo[k].error))
    if verifier is not None:
        yield from judge(verifier, rest)


def _rated(found: Sequence[ImageResult]) -> list[ImageResult]:
    """Adds the scores that verdicts of an ensemble have among the images of the same prompt."""
    prompts: dict[str, list[int]] = {}
    for k, one in enumerate(found):
        prompts.setdefault(json.dumps(one.target.item, sort_keys=True), []).append(k)
    verdicts = [one.verdict for one in found]
    for positions in prompts.values():
        for k, verdict in zip(positions, with_ensemble_scores([verdicts[k] for k in positions]), strict=True):
            verdicts[k] = verdict or verdicts[k]
    return [replace(one, verdict=verdict) for one, verdict in zip(found, verdicts, strict=True)]


class _Lines:
    """Prints the images in their order, each as soon as those before it are known."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._out = sys.stdout  # a progress bar replaces sys.stdout
        self._count, self._next = len(targets), 0

    def print(self, found: Mapping[int, ImageResult]) -> None:
        while self._next < self._count and self._next in found:
            target, verdict = found[self._next].target, found[self._next].verdict
            columns = [f"{verdict.score:.6g}" if verdict.scored else NONE, verdict.label or NONE, shown(target.path)]
            if verdict.error:
                columns.append(one_line(verdict.error))
            print("\t".join(columns), file=self._out, flush=True)
            self._next += 1


def _summary(found: Sequence[ImageResult], usage: Usage, seconds: float) -> str:
    missing = sum(one.verdict.missing for one in found)
    scored = [one.verdict for one in found if one.verdict.scored]
    counts = [f"{len(scored)} of {len(found)} images scored"]
    if scored:
        counts.append(f"mean {sum(verdict.score or 0.0 for verdict in scored) / len(scored):.4g}")
    if labels := [verdict.label for verdict in scored if verdict.label in ("yes", "no")]:
        counts.append(f"{labels.count('yes') / len(labels):.0%} yes")
    if partly := sum(verdict.error is not None for verdict in scored):
        counts.append(f"{partly} not by all members")
    if unscored := len(found) - len(scored) - missing:
        counts.append(f"{unscored} could not be scored (their lines say why)")
    if missing:
        words = "question" if missing == 1 else "questions"
        counts.append(f"{missing} {words} of the verifier without an answer (the same command asks again)")
    if usage.converted:
        counts.append(f"{usage.converted} answers converted")
    if tokens := usage.prompt_tokens + usage.completion_tokens:
        cost = f" (${usage.cost:.4f})" if usage.cost else ""
        counts.append(f"{usage.calls} questions, {tokens:,} tokens{cost}")
    return f"{', '.join(counts)}; {seconds:.1f} s"
