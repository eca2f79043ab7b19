"""How many held-out prompts are right after so many images, by the ways to spend them; judged exactly.

Every arm is a search by the engine, with the verifier and the writers that a user has; the exact judge sees its
pictures only afterwards. Two arms follow from the images of plain noise: an oracle that chooses by the exact judge,
and one that keeps or draws again by the verifier's findings, without a corrector.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.report.runs import SearchRun, read_run
from rflow_jax.search.config import Kind, NoiseStage, ReflectStage, RunConfig, SearchConfig
from rflow_jax.shapes.grammar import from_metadata, held_out_prompts
from rflow_jax.shapes.judge import judge
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.checks import require_least, require_seed
from rflow_jax.utils.json_files import read_object
from rflow_jax.verifiers.config import VERIFIERS
from rflow_jax.verifiers.findings import remedies_in
from rflow_jax.weights.hub import resolve_lora
from rflow_jax.weights.lora.export import save_lora
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.writers.base import WRITERS

CHAINS = 2  # images of a round
COUNTS = (1, 2, 4, 8, 16, 32)


class Arm(NamedTuple):
    """A way to spend images.

    Attributes:
        title: in tables.
        kind: of the search.
        reflector, refiner: its writers.
        untrained: whether the corrector is one that has learned nothing.
    """

    title: str
    kind: Kind
    reflector: str = "rules"
    refiner: str = "rules"
    untrained: bool = False


ARMS = {
    "noise": Arm("noise, the verifier chooses", "noise"),
    "prompt": Arm("noise, prompts reworded", "noise-prompt", refiner="rflow_jax.shapes.arms:Rewording"),
    "reflection": Arm("reflection", "reflect"),
    "untrained": Arm("reflection, untrained corrector", "reflect", untrained=True),
    "silent": Arm("correction without a reflection", "reflect", reflector="rflow_jax.shapes.arms:Silence"),
    "blind": Arm("reflection without the picture", "noise-prompt", refiner="rflow_jax.shapes.arms:ReflectionInPrompt"),
}
ORACLE, AGAIN = "noise, an oracle chooses", "keep or draw again, no corrector"


@dataclass(frozen=True)
class ScalingConfig:
    """The share of held-out prompts that are right after 1, 2, 4 ... images, for each way to spend them.

    Attributes:
        out: folder of results; a run that was stopped goes on.
        model: the pipeline.
        lora: the corrector.
        verifier: model of the verifier ``checklist``, who chooses and finds.
        prompts: how many held-out prompts.
        images: of each prompt.
        seeds: each is a run of every arm.
        arms: which ones; those of noise's images come with ``noise``.
        num_inference_steps: denoising steps; null: the model's own.
        dtype: of the models' weights and activations.
        batch_size: pictures denoised together.
        latent_lora: whether the corrector acts on the image's tokens too.
    """

    out: str
    model: str = "shapes"
    lora: str = "shapes-corrector"
    verifier: str = "shapes-verifier"
    prompts: int = 240
    images: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(ARMS)
    num_inference_steps: int | None = None
    dtype: str = "bfloat16"
    batch_size: int = 64
    latent_lora: bool = False

    def __post_init__(self) -> None:
        require_least(self, "", prompts=1, images=CHAINS, batch_size=1, num_inference_steps=1)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are {list(self.seeds)}: give some, none twice")
        for seed in self.seeds:
            require_seed("seeds", seed)
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise InputError(f"arms: unknown: {', '.join(unknown)}; known: {', '.join(ARMS)}")
        if self.images % CHAINS:
            raise InputError(f"images is {self.images}: give a multiple of {CHAINS}")

    @property
    def untrained(self) -> Path:
        """The corrector before its training."""
        return Path(self.out) / "untrained"

    def search(self, arm: Arm, seed: int) -> SearchConfig:
        """The search of an arm."""
        rounds, corrects = self.images // CHAINS, arm.kind == "reflect"
        lora = str(self.untrained) if arm.untrained else self.lora
        verifier = {"name": "checklist", "model": self.verifier, "dtype": self.dtype, "batch_size": self.batch_size}
        return SearchConfig(
            self.model,
            lora=lora if corrects else None,
            dtype=self.dtype,
            seed=seed,
            prompts_in_flight=max(16, 2 * self.batch_size),
            noise=NoiseStage(1 if corrects else rounds, CHAINS),
            reflect=ReflectStage(max(rounds - 1, 1), CHAINS),
            max_images=self.images,
            sampling=SamplingConfig(
                num_inference_steps=self.num_inference_steps,
                batch_size=self.batch_size,
                latent_lora=self.latent_lora and corrects,
            ),
            verifier=VERIFIERS.parse(verifier),
            reflector=WRITERS.parse({"name": arm.reflector}),
            refiner=WRITERS.parse({"name": arm.refiner}),
        )


class Judged(NamedTuple):
    """The pictures of one arm and seed.

    Attributes:
        scores: of the verifier, [prompts, images].
        right: what the exact judge says, [prompts, images].
        kept: whether the verifier found nothing wrong, [prompts, images].
    """

    scores: np.ndarray
    right: np.ndarray
    kept: np.ndarray

    def chosen(self, count: int) -> np.ndarray:
        """Whether the best by the verifier of the first ``count`` pictures is right, [prompts]."""
        return _at(self.right, self.scores[:, :count])

    def any_right(self, count: int) -> np.ndarray:
        """Whether any of the first ``count`` pictures is right, [prompts]."""
        return np.asarray(self.right[:, :count].any(axis=1))

    def again(self, count: int) -> np.ndarray:
        """As :meth:`chosen`, where each chain draws again until the verifier finds nothing wrong, then keeps.

        A picture that is kept counts as an image of each later round, as one that a corrector is told to keep does.
        """
        rounds = max(count // CHAINS, 1)
        drawn = self.kept[:, : rounds * CHAINS].reshape(len(self.kept), rounds, CHAINS)
        stops = np.where(drawn.any(axis=1), drawn.argmax(axis=1), rounds - 1)
        seen = np.arange(rounds)[None, :, None] <= stops[:, None, :]
        scores = np.where(seen.reshape(len(seen), -1)[:, :count], self.scores[:, :count], -np.inf)
        return _at(self.right, scores)


def _at(values: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """In each row the value where the score is highest; the first of equal ones."""
    return np.take_along_axis(values, scores.argmax(axis=1)[:, None], axis=1)[:, 0]


def run_scaling(config: ScalingConfig) -> dict[str, Any]:
    """Runs what is missing, and returns the table; also ``table.json`` and ``table.md``.

    Raises:
        InputError: a model cannot be used, or the folder holds results of another configuration.
    """
    from rflow_jax.search.run import search

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    prompts = held_out_prompts(config.prompts)
    file = out / "prompts.jsonl"
    write_file(file, "".join(json.dumps(prompt.metadata) + "\n" for prompt in prompts))
    _require_same_settings(config, out / "settings.json")
    if "untrained" in config.arms and not config.untrained.exists():
        adapters = read_lora(resolve_lora(config.lora)).adapters
        save_lora({name: replace(one, b=np.zeros_like(one.b)) for name, one in adapters.items()}, config.untrained)
    judged: dict[str, list[Judged]] = {}
    for name in config.arms:
        for seed in config.seeds:
            result = out / f"{name}_{seed}.npz"
            if not result.exists():
                arm, folder = ARMS[name], out / f"{name}_{seed}"
                if search(arm.kind, config.search(arm, seed), RunConfig(str(file), str(folder))):
                    raise InputError(f"{folder}: no image has a score; see its records")
                run = read_run(folder)
                _store(result, judge_run(run, config.images))
                _keep_sheet(run, out / f"{name}_{seed}.png")
                shutil.rmtree(folder)
            with np.load(result) as stored:
                judged.setdefault(name, []).append(Judged(**stored))
    table = table_of(judged, [prompt.tag for prompt in prompts], config.images)
    write_file(out / "table.json", json.dumps(table, indent=2) + "\n")
    write_file(out / "table.md", markdown(table))
    return table


def _require_same_settings(config: ScalingConfig, file: Path) -> None:
    """Writes what the results depend on, or compares it with what stands there."""
    free = ("out", "arms", "seeds", "batch_size")
    settings = {key: value for key, value in asdict(config).items() if key not in free}
    before = read_object(file) if file.exists() else settings
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        was, now = before.get(changed[0]), settings[changed[0]]
        raise InputError(f"{file.parent}: results of another {changed[0]} ({was}, not {now}); name a new folder")
    write_file(file, json.dumps(settings, indent=2) + "\n")


def judge_run(run: SearchRun, images: int) -> Judged:
    """The verifier's and the exact judge's decisions about a search's pictures; a missing one is never chosen."""
    shape = (len(run.prompts), images)
    found = Judged(np.full(shape, -np.inf), np.zeros(shape, bool), np.zeros(shape, bool))
    for row, prompt in enumerate(run.prompts):
        place = run.folder / prompt.folder
        metadata = from_metadata(json.loads((place / "metadata.jsonl").read_text().splitlines()[0]))
        for column, picture in enumerate(prompt.pictures[:images]):
            with Image.open(place / picture.file) as image:
                found.right[row, column] = judge(metadata, image.convert("RGB")).correct
            if picture.verdict is not None and picture.scored:
                found.scores[row, column] = picture.verdict.score
                found.kept[row, column] = remedies_in(picture.verdict.explanation) == []
    return found


def _store(path: Path, judged: Judged) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **judged._asdict())
    partial.rename(path)


def _keep_sheet(run: SearchRun, file: Path, rows: int = 8, columns: int = 8) -> None:
    """A picture of the first images of some prompts: a row each."""
    step = max(len(run.prompts) // rows, 1)
    sheet = None
    for row, prompt in enumerate(run.prompts[::step][:rows]):
        for column, picture in enumerate(prompt.pictures[:columns]):
            with Image.open(run.folder / prompt.folder / picture.file) as image:
                if sheet is None:
                    sheet = Image.new("RGB", (columns * (image.width + 2), rows * (image.height + 2)), "white")
                sheet.paste(image.convert("RGB"), (column * (image.width + 2), row * (image.height + 2)))
    if sheet is not None:
        sheet.save(file)


def table_of(judged: Mapping[str, Sequence[Judged]], tags: Sequence[str], images: int) -> dict[str, Any]:
    """Means over seeds, with their standard deviation and the standard error over prompts.

    Returns:
        ``counts``; and ``arms``: title -> ``mean``, ``deviation`` (over seeds) and ``error`` (over prompts) at each
        count, and ``tags`` with the means of each tag.
    """
    counts = [count for count in COUNTS if count <= images]
    arms: dict[str, Any] = {}
    for name, runs in judged.items():
        arms[ARMS[name].title] = [[run.chosen(count) for count in counts] for run in runs]
        if name == "noise":
            arms[ORACLE] = [[run.any_right(count) for count in counts] for run in runs]
            arms[AGAIN] = [[run.again(count) for count in counts] for run in runs]
    return {"counts": counts, "arms": {title: _summary(np.asarray(found), tags) for title, found in arms.items()}}


def _summary(right: np.ndarray, tags: Sequence[str]) -> dict[str, Any]:
    """Of decisions [seeds, counts, prompts]."""
    by_seed, by_prompt = right.mean(axis=2), right.mean(axis=0)
    several = len(right) > 1
    error = by_prompt.std(axis=1, ddof=1) / np.sqrt(right.shape[2]) if right.shape[2] > 1 else np.zeros(right.shape[1])
    named = np.asarray(tags)
    return {
        "mean": by_seed.mean(axis=0).tolist(),
        "deviation": (by_seed.std(axis=0, ddof=1) if several else np.zeros(right.shape[1])).tolist(),
        "error": error.tolist(),
        "tags": {tag: by_prompt[:, named == tag].mean(axis=1).tolist() for tag in dict.fromkeys(tags)},
    }


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown: mean ± deviation over seeds, in per cent."""
    lines = [
        "| images | " + " | ".join(map(str, table["counts"])) + " |",
        "|---|" + "---|" * len(table["counts"]),
    ]
    for title, found in table["arms"].items():
        cells = [f"{100 * m:.1f} ± {100 * d:.1f}" for m, d in zip(found["mean"], found["deviation"], strict=True)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
