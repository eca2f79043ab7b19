"""One search from its configuration to its folder: noise, noise-prompt or reflect."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError, serving
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.search.budget import Budget
from rflow_jax.search.config import Kind, RunConfig, SearchConfig
from rflow_jax.search.engine import Engine, Generator, Models
from rflow_jax.search.inputs import given_images, read_prompts, slice_prompts
from rflow_jax.search.progress import BusyClock, SearchProgress
from rflow_jax.search.prompt_folder import RECORDS, PromptFolder, check_entry, finished_records, folder_of
from rflow_jax.search.prompt_search import PromptSearch, SearchContext
from rflow_jax.search.run_folder import MODELS, claim, public_section, require_same, write_config
from rflow_jax.search.summary import Lacking, summary
from rflow_jax.utils.output_folder import usable_folder
from rflow_jax.utils.recipes import find_prompts
from rflow_jax.utils.secrets import without_secrets
from rflow_jax.utils.shown import one_line
from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.config import VerifierConfig
from rflow_jax.writers import REFINE_PROMPT, REFLECTION_PROMPT, make_text_generator
from rflow_jax.writers.base import TextGeneratorConfig

Entries = Mapping[int, Mapping[str, Any]]


def search(kind: Kind, config: SearchConfig, run_config: RunConfig) -> int:
    """Makes images of each prompt and chooses the best; returns the exit status.

    Args:
        kind: noise (fresh noise), noise-prompt (each branch's prompt is refined from image to image) or reflect (the
            best images are corrected round by round).

    Raises:
        InputError: the configuration, a prompt, or the content of the folder is not usable.
    """
    if kind != "reflect":
        config = replace(config, lora=None, lora_alpha=None)
    if run_config.strategy not in (None, kind):
        raise InputError(f"strategy is {run_config.strategy}: this configuration is of rflow {run_config.strategy}")
    if run_config.images is not None and kind != "reflect":
        raise InputError("images: only reflect begins with the images of another run")
    config.require_fit(kind, given=run_config.images is not None)
    out = Path(run_config.out)
    # What ``--config`` reads again; addresses lose what may be secret in them.
    published = asdict(config) | asdict(run_config) | {"strategy": kind}
    published |= {role: public_section(getattr(config, role)) for role in MODELS}
    entries = slice_prompts(read_prompts(find_prompts(run_config.prompts)), run_config.start, run_config.end)
    process_index, processes = _process(run_config)
    # First of all: what is to be done can only be known once nobody else is at it.
    with usable_folder(out), claim(out, process_index):
        return _start(kind, config, run_config, published, entries, process_index, processes)


def _start(
    kind: Kind,
    config: SearchConfig,
    run_config: RunConfig,
    published: Mapping[str, Any],
    entries: Entries,
    process_index: int,
    processes: int,
) -> int:
    """Searches what is left in a folder that is claimed."""
    out = Path(run_config.out)
    require_same(out, published)
    for index, entry in entries.items():
        check_entry(out, index, entry)
    mine = {index: entries[index] for index in entries if index % processes == process_index}
    finished = {index: finished_records(out, index) for index in mine}
    todo = {index: entry for index, entry in mine.items() if finished[index] is None}
    before = Lacking.of(record for records in finished.values() for record in records or ())
    if not todo:
        lacking = f", {before.in_words()} (their records say why)" if before else ""
        print(f"{out}: all {len(mine)} prompts are done{lacking}; nothing to do")
        return 1 if before else 0
    given = given_images(Path(run_config.images), todo) if run_config.images else {}
    accounts = Budget(out, process_index, tuple(MODELS), config.budget)
    probe = run_config.probe and not accounts.over_budget()
    models = _make_models(config.roles(kind), accounts.meters, probe)
    try:
        pipe = _load(kind, config)
    except BaseException:
        models.close()
        raise
    # Only now: a model that cannot be loaded must not leave a folder that the next try finds taken.
    write_config(out, published)
    return _search(kind, config, out, pipe, models, accounts, todo, given, before)


def _make_models(
    roles: Mapping[str, VerifierConfig | TextGeneratorConfig], meters: Mapping[str, UsageTracker], probe: bool
) -> Models:
    """The models of these roles; those over HTTP first, so that they are asked before any weights are read."""
    models = Models()
    prompts = {"reflector": REFLECTION_PROMPT, "refiner": REFINE_PROMPT}
    try:
        for role, model in sorted(roles.items(), key=lambda one: not one[1].asks_endpoint):
            with serving(role, settings=True):
                if isinstance(model, VerifierConfig):
                    made = make_verifier(model, meters[role], probe=probe)
                else:
                    made = make_text_generator(model, prompts[role], meters[role], probe=probe)
            models = replace(models, **{role: made})
    except BaseException:
        models.close()
        raise
    return models


def _search(
    kind: Kind,
    config: SearchConfig,
    out: Path,
    pipe: Generator,
    models: Models,
    accounts: Budget,
    todo: Entries,
    given: Mapping[int, list[Path]],
    before: Lacking,
) -> int:
    """Searches the prompts that are left.

    Args:
        before: what the others lack.

    Returns:
        The exit status: 1 if an image, a score or a text that was asked for is not there.
    """
    context = _context(config, pipe, models)

    def prompts() -> Iterator[PromptSearch]:
        for index, entry in todo.items():
            images = given.get(index, [])
            strategy = config.strategy(kind, len(images) if images else None)
            yield PromptSearch(PromptFolder(out, index, entry), strategy, context, images)

    planned = sum(config.strategy(kind, len(given[i]) if i in given else None).images() for i in todo)
    clock = BusyClock()
    live = SearchProgress(planned, clock, accounts.total)
    live.unmade(before.images)

    def keep(now: bool = False) -> None:
        accounts.write(live.images, clock.fraction, now)

    engine = Engine(
        pipe,
        models,
        config.sampling,
        config.prompts_in_flight,
        live,
        clock,
        should_stop=accounts.over_budget,
        on_tick=keep,
    )
    try:
        with live:
            engine.run(prompts())
    finally:
        keep(now=True)
    undecided = [index for index in todo if not (folder_of(out, index) / RECORDS).exists()]
    print(summary(len(todo), undecided, live, accounts.total(), out, verified=context.verified))
    if live.first_failure:
        said = f"the first failure was: {live.first_failure}; all are in {out}/*/records.jsonl"
        print(one_line(said), file=sys.stderr)
    if engine.stopped:
        print(f"stopped: {engine.stopped}; the same command with a larger budget continues", file=sys.stderr)
    if lacking := live.without_answer():
        print(f"{without_secrets(lacking)}; give the same command again, which asks them again", file=sys.stderr)
    return 1 if undecided or before or live.lacking else 0


def _context(config: SearchConfig, pipe: Generator, models: Models) -> SearchContext:
    roles = {"verifier": models.verifier, "reflector": models.reflector, "refiner": models.refiner}
    return SearchContext(
        config.seed,
        models.verifier is not None,
        config.reflect.history,
        config.noise.noise_similarity,
        config.reflect.include_initial_images,
        {
            "model": config.model,
            "lora": config.lora,
            "lora_alpha": config.lora_alpha,
            "dtype": config.dtype,
            "closeness": config.noise.noise_similarity,
            "models": {role: None if model is None else model.name for role, model in roles.items()},
            "settings": asdict(pipe.resolve(config.sampling)),
        },
    )


def _load(kind: Kind, config: SearchConfig) -> Any:
    import jax

    from rflow_jax.generation.pipeline import load_pipeline
    from rflow_jax.parallel.mesh import make_mesh
    from rflow_jax.parallel.sharding import unclaimed

    claims = [claim for model in config.roles(kind).values() for claim in model.claimed_devices]
    devices = unclaimed(claims)
    mesh = None if devices == jax.local_devices()[:1] else make_mesh(config.mesh, devices)
    return load_pipeline(
        config.model,
        lora=config.lora,
        lora_alpha=config.lora_alpha,
        dtype=config.dtype,
        mesh=mesh,
        scan_blocks=config.scan_blocks,
    )


def _process(run_config: RunConfig) -> tuple[int, int]:
    """(index of this process, number of processes)."""
    if not run_config.distributed.enabled:
        return run_config.process_index, run_config.process_count
    import jax

    from rflow_jax.parallel.distributed import start_processes

    start_processes(run_config.distributed)
    return jax.process_index(), jax.process_count()
