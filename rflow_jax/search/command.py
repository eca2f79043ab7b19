"""``infer.py noise`` and ``infer.py reflect``."""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rflow_jax.chat import public_url
from rflow_jax.language.http import REFINE_PROMPT, REFLECTION_PROMPT, HttpWriter
from rflow_jax.search.config import SearchConfig
from rflow_jax.search.engine import Correction, Search
from rflow_jax.search.progress import Counters
from rflow_jax.search.prompts import read_prompts, slice_prompts
from rflow_jax.search.store import claim_folder, write_config
from rflow_jax.verifiers.openai import OpenAIVerifier


@dataclass(frozen=True)
class RunConfig:
    """Which prompts are searched, and where the results go.

    Attributes:
        prompts: file with GenEval metadata, one JSON object a line.
        out: folder of the run; empty or new.
        start: first prompt of the file.
        end: the prompt to stop before; -1 goes on to the last.
    """

    prompts: str
    out: str
    start: int = 0
    end: int = -1


def noise(config: SearchConfig, where: RunConfig) -> int:
    """Makes images of each prompt from fresh noise and chooses the best; returns the exit status."""
    return _run(replace(config, lora=None, lora_alpha=None), where, correct=False)


def reflect(config: SearchConfig, where: RunConfig) -> int:
    """Corrects the best noise images round by round with reflections; returns the exit status."""
    config.require_reflect()
    return _run(config, where, correct=True)


def _run(config: SearchConfig, where: RunConfig, correct: bool) -> int:
    entries = slice_prompts(read_prompts(where.prompts), where.start, where.end)
    verifier = OpenAIVerifier(config.verifier) if config.verifier.name == "openai" else None
    correction = None
    if correct:
        reflector = HttpWriter(config.reflector, REFLECTION_PROMPT)
        correction = Correction(reflector, HttpWriter(config.refiner, REFINE_PROMPT))
    out = Path(where.out)
    claim_folder(out)

    from rflow_jax.pipeline import load_pipeline

    pipe = load_pipeline(config.model, lora=config.lora, lora_alpha=config.lora_alpha, dtype=config.dtype)
    # Only now: a model that cannot be loaded must not leave a folder that the next try finds taken.
    write_config(out, _to_publish(config, where))
    counters = Search(config, pipe, verifier, correction, out).run(entries)
    print(_summary(len(entries), counters, out, verified=verifier is not None))
    if counters.first_failure:
        print(f"the first failure was: {counters.first_failure}; all are in {out}/*/records.jsonl", file=sys.stderr)
    return 1 if verifier and not counters.scored else 0


def _to_publish(config: SearchConfig, where: RunConfig) -> dict[str, Any]:
    """The configuration as YAML that ``--config`` reads again; addresses lose what may be secret in them."""
    written = asdict(config) | asdict(where)
    for role in ("verifier", "reflector", "refiner"):
        endpoint = getattr(config, role)
        written[role]["model"] = endpoint.model_name
        if endpoint.base_url:
            written[role]["base_url"] = public_url(endpoint.base_url)
    return written


def _summary(prompts: int, counters: Counters, out: Path, verified: bool) -> str:
    counts = [f"{prompts} prompt{'s' if prompts > 1 else ''}", f"{counters.images} images"]
    if verified:
        counts += [f"{counters.scored} scored", f"{counters.unscored} without a score"]
    if counters.text_failures:
        counts.append(f"{counters.text_failures} texts failed")
    best = f"the best lie in {out}/*/samples_best" if counters.scored else f"the images lie in {out}/*/samples"
    return f"{', '.join(counts)}; {best}"
