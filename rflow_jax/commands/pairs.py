"""``rflow pairs``: corrections of known bad images, beside the good ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image, fromarray

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import Record, RecordError
from rflow_jax.data.transforms import pictures, uniforms
from rflow_jax.errors import InputError
from rflow_jax.generation.config import ResolvedSampling, SamplingConfig, require_lora_effect
from rflow_jax.search.config import RunConfig, SearchConfig
from rflow_jax.utils.atomic_io import write_file
from rflow_jax.utils.checks import require_dtype, require_text
from rflow_jax.utils.cli import Command
from rflow_jax.utils.files import is_file, read_text
from rflow_jax.utils.images import png_bytes, read_image, side_by_side
from rflow_jax.utils.json_files import parse_json, parse_json_lines
from rflow_jax.utils.output_folder import Claim, usable_folder
from rflow_jax.utils.progress import count_progress
from rflow_jax.utils.ranges import Positive, Seed, require_ranges
from rflow_jax.utils.shown import one_line

# What to change, by the names that data sets give it; the first that is there counts.
REFLECTIONS = ("reflection_prompt", "instruction", "reflection", "edited_prompt_list")


@dataclass(frozen=True)
class PairsConfig:
    """The pairs to correct, the model and the LoRA.

    Attributes:
        file: a JSON list, or JSON lines, of {"bad_image", "good_image", "prompt", "reflection"}; paths from the file's
            folder.
        out: folder for the pictures; those that are there already are not made again.
        model: the pipeline: a converted or diffusers-layout folder, or a Hub id.
        lora: the corrector's LoRA file or folder.
        lora_alpha: its alpha, for files that do not say; null is the rank.
        dtype: number type of the weights and activations, bfloat16 or float32.
        seed: with the number of a pair it gives the noise.
        crop: the square that is cut from pictures that are none: "center", or "random" by the seed.
        sampling: how an image is generated; ``--height`` and so on are short for ``--sampling.height``.
    """

    file: str
    out: str
    model: str
    lora: str
    lora_alpha: Positive | None = None
    dtype: str = "bfloat16"
    seed: Seed = 0
    crop: Literal["center", "random"] = "center"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        require_ranges(self)


@dataclass(frozen=True)
class CorrectionPair:
    """One entry of the file."""

    number: int
    bad_image: Path
    good_image: Path
    prompt: str
    reflection: str
    name: Any


def command(name: str, argv: Sequence[str]) -> Command:
    """The command, which also reads a search's YAML file; the list of pairs may be given without its flag."""
    shared = ("model", "lora", "lora_alpha", "dtype", "seed", "sampling")
    return Command((PairsConfig,), pairs, ("file",), (SearchConfig, RunConfig), shared)


def pairs(config: PairsConfig) -> int:
    """Writes ``{number}.png`` (bad, good, generated), ``generated/{number}.png`` and ``{number}.json``.

    Returns:
        The exit status: 1 if a picture could not be read or made; the others are.

    Raises:
        InputError: the file, the model or the folder is not usable.
    """
    settings = config.sampling
    if None not in (settings.height, settings.width):
        _require_square(settings)
    require_lora_effect(settings, with_condition=True)
    out = Path(config.out)
    listed = read_pairs(Path(config.file))
    with usable_folder(out), Claim(out):
        todo = [pair for pair in listed if not _file(out, pair).exists()]
        if not todo:
            print(f"{out}: all {len(listed)} pairs are done; nothing to do")
            return 0
        return _correct(config, todo)


def _correct(config: PairsConfig, todo: list[CorrectionPair]) -> int:
    """Loads the model and corrects what is left; returns the exit status."""
    from rflow_jax.generation.pipeline import load_pipeline

    out, settings = Path(config.out), config.sampling
    pipe = load_pipeline(config.model, lora=config.lora, lora_alpha=config.lora_alpha, dtype=config.dtype)
    settings = pipe.resolve(settings)
    unread = unmade = 0
    _require_square(settings)
    with count_progress() as bar:
        task = bar.add_task("compiling and correcting", total=len(todo))
        for first in range(0, len(todo), settings.batch_size):
            chunk = todo[first : first + settings.batch_size]
            ready = list(_readable(chunk, config, settings))
            unread += len(chunk) - len(ready)
            images = _corrected(pipe, ready, config.seed, settings)
            unmade += len(ready) - len(images)
            for place, image in images.items():
                pair, bad, good = ready[place]
                file = _file(out, pair)
                record = _record(config, pair, asdict(settings))
                write_file(file.with_suffix(".json"), json.dumps(record, ensure_ascii=False, indent=2) + "\n")
                write_file(out / "generated" / file.name, png_bytes(image))
                write_file(file, png_bytes(side_by_side([bad, good, image])))  # last: the sign that the pair is done
            bar.update(task, advance=len(chunk), description="correcting")
    failures = [f"; {count} could not be {what}" for what, count in (("read", unread), ("made", unmade)) if count]
    print(f"{len(todo) - unread - unmade} pairs in {out}{''.join(failures)}")
    return 1 if failures else 0


def _corrected(
    pipe: Any, ready: Sequence[tuple[CorrectionPair, Image, Image]], seed: int, settings: SamplingConfig
) -> dict[int, Image]:
    """The corrected pictures, by their place; one that could not be made is missing, and told."""
    from rflow_jax.generation.pipeline import NotFiniteError

    images: dict[int, Image] = {}
    try:
        pipe.generate(
            [pair.prompt for pair, _, _ in ready],
            seeds=[(seed, pair.number) for pair, _, _ in ready],
            conditions=[bad for _, bad, _ in ready],
            reflections=[pair.reflection for pair, _, _ in ready],
            settings=settings,
            on_images=lambda first, found: images.update(enumerate(found, first)),
        )
    except NotFiniteError as error:
        for place, reason in error.failed.items():
            print(one_line(f"left out: pair {ready[place][0].number}: {reason}"), file=sys.stderr)
    return images


def _require_square(settings: SamplingConfig) -> None:
    if settings.height != settings.width:
        raise InputError(f"pairs are squares: give one number as height and width, not {settings.height} and "
                         f"{settings.width}")  # fmt: skip


def read_pairs(path: Path) -> list[CorrectionPair]:
    """The entries of a file, in order.

    Raises:
        InputError: the file cannot be read, or an entry lacks something; says which.
    """
    text = read_text(path, "list of pairs")
    if text.lstrip().startswith("["):
        entries = parse_json(text, str(path))
    else:
        entries = (entry for _, entry in parse_json_lines(text, path))
    found = [_pair(entry, number, path) for number, entry in enumerate(entries)]
    if not found:
        raise InputError(f"{path}: contains no pairs")
    return found


def _pair(entry: Any, number: int, path: Path) -> CorrectionPair:
    source = f"{path}: pair {number}"
    if not isinstance(entry, dict):
        raise InputError(f"{source}: expected an object with bad_image, good_image, prompt and reflection")
    reflection = next((entry[key] for key in REFLECTIONS if entry.get(key)), None)
    if isinstance(reflection, list):  # a history of prompts: the last one says what is wanted
        reflection = reflection[-1] if reflection else None
    texts = {"bad_image": entry.get("bad_image"), "good_image": entry.get("good_image"), "prompt": entry.get("prompt")}
    for key, value in {**texts, "reflection": reflection}.items():
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{source}: {key} must be a text that is not empty")
        require_text(value, f"{source}: {key}")
    bad, good = (path.parent / entry[key] for key in ("bad_image", "good_image"))
    for file in (bad, good):
        if not is_file(file):
            raise InputError(f"{source}: {file}: no such file")
    assert isinstance(reflection, str)
    return CorrectionPair(number, bad, good, entry["prompt"], reflection, entry.get("image_id"))


def _readable(
    chunk: list[CorrectionPair], config: PairsConfig, sampling: ResolvedSampling
) -> Iterator[tuple[CorrectionPair, Image, Image]]:
    """(pair, bad picture as the condition, good picture) of those that can be read; prints why others are left out."""
    sizes = DataConfig("", target_size=sampling.height, condition_size=sampling.condition_size, crop=config.crop)
    for pair in chunk:
        position = uniforms(config.seed, pair.number)[:2] if config.crop == "random" else (None, None)
        try:
            # Upright and in 8 bits, as other images of users; what is trained on is read as the original reads it.
            files = [png_bytes(read_image(path)) for path in (pair.good_image, pair.bad_image)]
            record = Record(f"pair {pair.number}", "general", pair.prompt, pair.reflection, *files)
            good, bad = pictures(record, sizes, *position)
        except (InputError, RecordError) as error:
            print(one_line(f"left out: pair {pair.number}: {error}"), file=sys.stderr)
            continue
        yield pair, fromarray(bad), fromarray(good)


def _record(config: PairsConfig, pair: CorrectionPair, settings: dict[str, Any]) -> dict[str, Any]:
    own = {
        "number": pair.number,
        "image_id": pair.name,
        "bad_image": str(pair.bad_image),
        "good_image": str(pair.good_image),
        "prompt": pair.prompt,
        "reflection": pair.reflection,
        "seed": [config.seed, pair.number],
    }
    made_with = {key: getattr(config, key) for key in ("model", "lora", "lora_alpha", "dtype", "crop")}
    return own | made_with | {"settings": settings}


def _file(out: Path, pair: CorrectionPair) -> Path:
    return out / f"{pair.number:05d}.png"
