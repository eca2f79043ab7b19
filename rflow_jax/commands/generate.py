"""``rflow generate``: images of one prompt, each with a record of how it was made."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig, require_lora_effect
from rflow_jax.parallel.layout import MeshConfig
from rflow_jax.search.config import RECIPE, RunConfig, SearchConfig
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.checks import require_dtype, require_text
from rflow_jax.utils.cli import Command, early_value
from rflow_jax.utils.files import sha256_of
from rflow_jax.utils.images import png_bytes, read_image
from rflow_jax.utils.json_files import read_object
from rflow_jax.utils.output_folder import usable_folder
from rflow_jax.utils.progress import count_progress
from rflow_jax.utils.ranges import Count, Positive, require_ranges

Seed = int | tuple[int, ...]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateConfig:
    """Images of one prompt.

    Attributes:
        model: the pipeline: a converted or diffusers-layout folder, or a Hub id.
        prompt: what the images show.
        out: folder for the images and their records.
        lora: the corrector's LoRA file or folder.
        lora_alpha: its alpha, for files that do not say; null is the rank.
        dtype: number type of the weights and activations, bfloat16 or float32.
        condition: the image to correct.
        reflection: what to change in it.
        refined_prompt: a more detailed prompt for T5; CLIP keeps the prompt.
        seed: a number, or a search's seed as it stands in its file names, such as 0-12-3-1.
        num_images: images with seeds seed, seed + 1, ...
        mesh: how the first devices of this machine are laid out; each axis 1: one device.
        scan_blocks: stack the transformer's blocks and loop over them: a program that compiles in a fraction of the
            time; null: on TPU.
        sampling: how an image is generated; ``--height`` and so on are short for ``--sampling.height``.
    """

    model: str
    prompt: str
    out: str = "images"
    lora: str | None = None
    lora_alpha: Positive | None = None
    dtype: str = "bfloat16"
    condition: str | None = None
    reflection: str = ""
    refined_prompt: str = ""
    seed: int | str = 0
    num_images: Count = 1
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1))
    scan_blocks: bool | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("prompt is empty")
        for name in ("prompt", "reflection", "refined_prompt"):
            require_text(getattr(self, name), name)
        require_ranges(self)
        require_dtype(self.dtype)
        if self.lora_alpha is not None and self.lora is None:
            raise InputError("lora_alpha is given without a lora")
        if self.reflection and self.condition is None:
            raise InputError("reflection says what to change in a condition: give one, or put it into refined_prompt")


def command(name: str, argv: Sequence[str]) -> Command:
    """The command, which also reads a search's YAML file; the LoRA there is the corrector, so it needs a condition."""
    shared = ("model", "dtype", "seed", "mesh", "scan_blocks", "sampling")
    if early_value(argv, "condition", ""):
        shared += ("lora", "lora_alpha")
    return Command((GenerateConfig,), generate, kin=(SearchConfig, RunConfig), shared=shared, recipe=RECIPE)


def generate(config: GenerateConfig) -> int:
    """Writes ``seed_{seed}.png`` and ``seed_{seed}.json`` for each image; returns the exit status.

    Raises:
        InputError: an input is not usable, or a file of that name was made otherwise.
    """
    settings = config.sampling
    if config.lora is not None:
        require_lora_effect(settings, with_condition=config.condition is not None)
    elif config.condition is not None:
        log.warning("a condition without a lora: FLUX itself has not learned to correct an image")
    seeds = _seeds(config)
    names = [f"seed_{seed if isinstance(seed, int) else '-'.join(map(str, seed))}" for seed in seeds]
    condition = None if config.condition is None else read_image(Path(config.condition))
    out = Path(config.out)
    records = [_record(config, seed) for seed in seeds]
    for name, record in zip(names, records, strict=True):
        _require_free(out / f"{name}.png", record)
    with usable_folder(out):
        _write_images(config, seeds, names, records, condition)
    print(f"{config.num_images} image{'s' if config.num_images > 1 else ''} in {out}")
    return 0


def _write_images(
    config: GenerateConfig,
    seeds: Sequence[Seed],
    names: Sequence[str],
    records: Sequence[dict[str, Any]],
    condition: Image | None,
) -> None:
    """Loads the model, and writes each image with its record."""
    from rflow_jax.generation.pipeline import load_pipeline
    from rflow_jax.parallel.mesh import mesh_of_first

    out, settings = Path(config.out), config.sampling
    options: dict[str, Any] = {"dtype": config.dtype}
    if (mesh := mesh_of_first(config.mesh)) is not None:
        options["mesh"] = mesh
    if config.scan_blocks is not None:
        options["scan_blocks"] = config.scan_blocks
    pipe = load_pipeline(config.model, lora=config.lora, lora_alpha=config.lora_alpha, **options)
    used = asdict(pipe.resolve(settings))
    count = config.num_images
    with count_progress() as bar:
        task = bar.add_task("compiling and generating", total=count)

        def on_images(first: int, images: list[Image]) -> None:
            for number, image in enumerate(images, first):
                path = out / f"{names[number]}.png"
                record = records[number] | {"settings": used, "file": path.name}
                # The record comes first: an image is never without one.
                write_file(path.with_suffix(".json"), json.dumps(record, ensure_ascii=False, indent=2) + "\n")
                write_file(path, png_bytes(image))
            bar.update(task, advance=len(images), description="generating")

        pipe.generate(
            [config.prompt] * count,
            seeds=seeds,
            conditions=None if condition is None else [condition] * count,
            reflections=[config.reflection or None] * count,
            refined_prompts=[config.refined_prompt or None] * count,
            settings=settings,
            on_images=on_images,
        )


def _seeds(config: GenerateConfig) -> list[Seed]:
    """The seeds; the last number of a search's seed counts up."""
    if not re.fullmatch(r"\d+(-\d+)*", str(config.seed)):
        raise InputError(f"seed is {config.seed}: give a number from 0, or numbers joined by - such as 0-12-3-1")
    *front, last = (int(part) for part in str(config.seed).split("-"))
    return [(*front, last + number) if front else last + number for number in range(config.num_images)]


def _record(config: GenerateConfig, seed: Seed) -> dict[str, Any]:
    digest = None
    if config.condition is not None:
        digest = sha256_of(Path(config.condition), "condition")
    return {
        "prompt": config.prompt,
        "refined_prompt": config.refined_prompt or None,
        "reflection": config.reflection or None,
        "seed": seed if isinstance(seed, int) else list(seed),
        "condition": config.condition,
        "condition_sha256": digest,
        "model": config.model,
        "lora": config.lora,
        "lora_alpha": config.lora_alpha,
        "dtype": config.dtype,
        "settings": asdict(config.sampling),
    }


def _require_free(path: Path, record: Mapping[str, Any]) -> None:
    """Checks that there is no image of this name, or one that this very command would write again."""
    if not path.exists() and not path.with_suffix(".json").exists():
        return
    try:
        made = read_object(path.with_suffix(".json"))
        other = [key for key in record if key not in ("settings", "condition") and made[key] != record[key]]
        for key, value in record["settings"].items():
            if value is not None and made["settings"][key] != value:  # None: the model decides
                other.append(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        other = ["unknown settings"]
    if other:
        raise InputError(
            f"{path} exists, made with another {', '.join(other)}: give another --out or --seed, or remove the file"
        )
