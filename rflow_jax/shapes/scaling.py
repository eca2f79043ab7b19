"""How many held-out prompts are right after so many images, by the ways to spend them; judged exactly.

Every arm is a search by the engine, with the verifier and the writers that a user has; the exact judge sees its
pictures only afterwards. Two arms follow from the images of plain noise: an oracle that chooses by the exact judge,
and one that keeps or draws again by the verifier's findings, without a corrector.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rflow_jax.errors import InputError, RunError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.report.runs import SearchRun, read_run
from rflow_jax.report.templates import svg
from rflow_jax.search.config import NoiseStage, ReflectStage, RunConfig, SearchConfig
from rflow_jax.shapes.arms import ARMS, Arm
from rflow_jax.shapes.grammar import from_metadata, held_out_prompts
from rflow_jax.shapes.judge import judge
from rflow_jax.shapes.scaling_table import Judged, curves_of, markdown, table_of
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.images import read_image
from rflow_jax.utils.json_files import read_object
from rflow_jax.utils.output_folder import Claim, usable_folder
from rflow_jax.utils.ranges import BatchSize, Count, DenoisingSteps, PairCount, Seed, require_ranges
from rflow_jax.verifiers.config import VERIFIERS
from rflow_jax.verifiers.findings import remedies_in
from rflow_jax.weights.hub import resolve_lora
from rflow_jax.weights.lora.export import save_lora
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.writers.base import WRITERS


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
        chains: of every search: images of a round, each corrected from the last one of its chain.
        latent_lora: whether the corrector acts on the image's tokens too.
    """

    out: str
    model: str = "shapes"
    lora: str = "shapes-corrector"
    verifier: str = "shapes-verifier"
    prompts: Count = 240
    images: PairCount = 32
    seeds: tuple[Seed, ...] = (0, 1, 2)
    arms: tuple[str, ...] = tuple(ARMS)
    num_inference_steps: DenoisingSteps | None = None
    dtype: str = "bfloat16"
    batch_size: BatchSize = 64
    chains: Count = 2
    latent_lora: bool = False

    def __post_init__(self) -> None:
        require_ranges(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds are {list(self.seeds)}: give some, none twice")
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise InputError(f"arms: unknown: {', '.join(unknown)}; known: {', '.join(ARMS)}")
        if self.images % self.chains:
            raise InputError(f"images is {self.images}: give a multiple of chains ({self.chains})")

    @property
    def untrained(self) -> Path:
        """The corrector before its training."""
        return Path(self.out) / "untrained"

    def search(self, arm: Arm, seed: int) -> SearchConfig:
        """The search of an arm."""
        rounds, corrects = self.images // self.chains, arm.kind == "reflect"
        lora = str(self.untrained) if arm.untrained else self.lora
        verifier = {"name": "checklist", "model": self.verifier, "dtype": self.dtype, "batch_size": self.batch_size}
        return SearchConfig(
            self.model,
            lora=lora if corrects else None,
            dtype=self.dtype,
            seed=seed,
            prompts_in_flight=max(16, 2 * self.batch_size),
            noise=NoiseStage(1 if corrects else rounds, self.chains),
            reflect=ReflectStage(max(rounds - 1, 1), self.chains),
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


def run_scaling(config: ScalingConfig) -> dict[str, Any]:
    """Runs what is missing, and returns the table; also ``table.json``, ``table.md`` and ``curves.svg``.

    Raises:
        InputError: a model cannot be used, or the folder holds results of another configuration.
        RunError: images of a search could not be made or scored.
    """
    out = Path(config.out)
    with usable_folder(out), Claim(out):
        return _run_missing(config, out)


def _run_missing(config: ScalingConfig, out: Path) -> dict[str, Any]:
    from rflow_jax.search.run import search

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
                    raise RunError(f"{folder}: not every image was made and scored; the same command tries again")
                run = read_run(folder)
                _store(result, judge_run(run, config.images))
                _keep_sheet(run, out / f"{name}_{seed}.png")
                shutil.rmtree(folder)
            with np.load(result) as stored:
                judged.setdefault(name, []).append(Judged(**stored))
    table = table_of(judged, [prompt.tag for prompt in prompts], config.images, config.chains)
    write_file(out / "table.json", json.dumps(table, indent=2) + "\n")
    write_file(out / "table.md", markdown(table))
    write_file(out / "curves.svg", svg(curves_of(table)))
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
            found.right[row, column] = judge(metadata, read_image(place / picture.file)).correct
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
            image = read_image(run.folder / prompt.folder / picture.file)
            if sheet is None:
                sheet = Image.new("RGB", (columns * (image.width + 2), rows * (image.height + 2)), "white")
            sheet.paste(image, (column * (image.width + 2), row * (image.height + 2)))
    if sheet is not None:
        sheet.save(file)
