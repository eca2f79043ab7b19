"""Errors of results against their recordings, measured as the recordings' tolerances define them."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.generation.pipeline import Pipeline, load_pipeline
from rflow_jax.models.flux.transformer import FluxTransformer
from rflow_jax.models.lora import attach
from rflow_jax.utils.json_files import read_json
from rflow_jax.weights.components import TRANSFORMER
from rflow_jax.weights.loading import load_into
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.weights.safetensors_io import TensorFiles

Tolerances = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
# (array's name, computed, recorded) -> (error, tolerance)
Judge = Callable[[str, Any, np.ndarray], tuple[float, float]]

GENERATED = re.compile(r"07_.*/.*(_latents_steps|_image_raw)")
GRADIENTS, PARAMETERS = "08_grads", "08_params_"
LANGUAGE_MODELS = ("qwen/", "nvila/")
MOVEMENT = "p - p_init, all tensors together"
TOGETHER, EACH, ZERO = "gradients, all tensors together", "gradients, each tensor", "tensors with zero gradient"


@dataclass(frozen=True)
class Moved:
    """Parameters after some steps; their movement from ``start`` is compared."""

    value: np.ndarray
    start: np.ndarray


def judge_of(file: str, want: Arrays, got: Mapping[str, Any], tolerances: Tolerances) -> Judge:
    """The measure for a file's arrays: most are compared one by one, some also as a whole."""
    if file.startswith(PARAMETERS):
        # The error of p - p_init over all tensors together; infinite unless every tensor is there in its shape.
        moved = [(got.get(stage), recorded) for stage, recorded in want.items()]
        error = float("inf")
        if all(isinstance(one, Moved) and one.value.shape == recorded.shape for one, recorded in moved):
            ours = [one.value.astype(np.float64) - one.start for one, _ in moved if one is not None]
            theirs = [recorded.astype(np.float64) - one.start for one, recorded in moved if one is not None]
            error = relative_error(_flat(ours), _flat(theirs))
        whole = error, movement_tolerance(file, tolerances)
        return lambda stage, one, recorded: whole
    if file == GRADIENTS:
        return _gradient_judge(want, got, tolerances)
    return lambda stage, one, recorded: measure(np.asarray(one), recorded, f"{file}/{stage}", tolerances)


def measure(got: np.ndarray, want: np.ndarray, array: str, tolerances: Tolerances) -> tuple[float, float]:
    """(error, tolerance) of one array, named ``file/array``."""
    if want.dtype == np.uint8:
        levels, share = picture_tolerance(tolerances["uint8 images"])
        return _image_error(got, want, levels), share
    if want.dtype.kind in "iub":
        same = got.shape == want.shape
        return (float(np.mean(got != want)) if same and want.size else float(not same)), 0.0
    if array.startswith("08_optim/") and array.endswith("_d"):
        # The largest of the columns' errors: they differ by orders of magnitude, and each counts.
        same = got.shape == want.shape
        error = max(relative_error(*columns) for columns in zip(got.T, want.T, strict=True)) if same else float("inf")
        return error, float(tolerances["prodigy_d columns, clip2 run"])
    if array.startswith(LANGUAGE_MODELS):
        kind = ", ".join(prefix.rstrip("/") for prefix in LANGUAGE_MODELS)
    elif GENERATED.fullmatch(array):
        kind = "generate (07) latents and images"
    elif re.fullmatch(r"08_.*(/|_)loss(es)?", array):
        kind = "loss"
    else:
        kind = TOGETHER if re.fullmatch(r"08_.*(/|_)grad_norm\w*", array) else "module stages"
    return relative_error(got, want), float(tolerances[kind])


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """L2 norm of the difference over that of the recording, in float64; 0/0 is 0, another shape or a NaN infinite."""
    if got.shape != want.shape:
        return float("inf")
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    difference, norm = np.linalg.norm((a - b).ravel()), np.linalg.norm(b.ravel())
    if difference == 0:
        return 0.0
    return float(difference / norm) if norm > 0 and np.isfinite(difference) else float("inf")


def _image_error(got: np.ndarray, want: np.ndarray, levels: int) -> float:
    """The share of values that differ; infinite if one differs by more than ``levels``."""
    if got.shape != want.shape:
        return float("inf")
    difference = np.abs(got.astype(np.int64) - want.astype(np.int64))
    return float(np.mean(difference > 0)) if difference.size == 0 or difference.max() <= levels else float("inf")


def picture_tolerance(text: str) -> tuple[int, float]:
    """(levels, share) from 'at most 1 level, in at most 0.5 % of the values'."""
    found = re.search(r"(\d+) levels?\D+([\d.]+) ?%", text)
    if not found:
        raise ValueError(f"verify_meta.json: the tolerance of uint8 images reads {text!r}")
    return int(found[1]), float(found[2]) / 100


def movement_tolerance(file: str, tolerances: Tolerances) -> float:
    """The tolerance that names this run of an optimizer; the strictest one for a run that none names."""
    run = file.removeprefix(PARAMETERS)
    known = {key: float(value) for key, value in tolerances.items() if key.startswith(MOVEMENT)}
    named = [value for key, value in known.items() if run in re.split(r"[:,] *", key)]
    return named[0] if named else min(known.values())


def _gradient_judge(want: Arrays, got: Mapping[str, Any], tolerances: Tolerances) -> Judge:
    complete = all(stage in got and np.shape(got[stage]) == recorded.shape for stage, recorded in want.items())
    together = _flat([np.asarray(got[stage]) for stage in want]) if complete else np.zeros(0)
    in_all = relative_error(together, _flat(list(want.values()))) <= float(tolerances[TOGETHER])
    absolute = float(str(tolerances[ZERO]).removeprefix("absolute "))

    def judge(stage: str, one: Any, recorded: np.ndarray) -> tuple[float, float]:
        one = np.asarray(one)
        if not in_all or one.shape != recorded.shape:
            return float("inf"), float(tolerances[TOGETHER])
        if not recorded.any():
            return float(np.abs(one).max(initial=0.0)), absolute
        return relative_error(one, recorded), float(tolerances[EACH])

    return judge


def _flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])


INPUT = "input"  # a check's answer for an array that it fed in


@dataclass(frozen=True)
class ArrayResult:
    """The verdict on one array."""

    file: str
    stage: str
    error: float | None
    tolerance: float | None
    status: str  # ok, FAIL, exempt, input, not covered
    remark: str = ""

    def __str__(self) -> str:
        numbers = ("-" if x is None else f"{x:.2e}" for x in (self.error, self.tolerance))
        remark = f"  ({self.remark})" if self.remark else ""
        return f"{self.file} {self.stage} {' '.join(numbers)} {self.status}{remark}"


def lines(recording: Recording, results: Mapping[str, Any]) -> Iterator[ArrayResult]:
    """A line for every array that is not an input by name.

    Args:
        results: ``file/array`` -> the computed array, an exception, or :data:`INPUT`.
    """
    for name in recording.names():
        arrays = {stage: want for stage, want in recording.arrays(name).items() if not stage.startswith("in_")}
        got = {stage: results.get(f"{name}/{stage}") for stage in arrays}
        judge = judge_of(name, arrays, got, recording.meta["tolerance"])
        for stage, want in arrays.items():
            ours = got[stage]
            if isinstance(ours, Exception):
                remark = f"{type(ours).__name__}: {str(ours).splitlines()[0]}"
                yield ArrayResult(name, stage, None, None, "FAIL", remark)
            elif isinstance(ours, str) and ours == INPUT:
                yield ArrayResult(name, stage, None, None, "input")
            elif recording.is_exempt(f"{name}/{stage}"):
                yield ArrayResult(name, stage, None, None, "exempt")
            elif ours is None:
                yield ArrayResult(name, stage, None, None, "not covered")
            else:
                error, tolerance = judge(stage, ours, want)
                yield ArrayResult(name, stage, error, tolerance, "ok" if error <= tolerance else "FAIL")


def summary(all_lines: Iterable[ArrayResult]) -> str:
    """How many arrays have each status, in one line."""
    counts = Counter(line.status for line in all_lines)
    kinds = ("ok", "FAIL", "exempt", "input", "not covered")
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds) + f"; {sum(counts.values())} arrays"


# Subfolders with arrays, and the prefix of their files' names.
FOLDERS = (("golden", ""), ("qwen", "qwen/"), ("nvila/golden", "nvila/"))


class Recording:
    """A folder of recordings, from which all sizes, settings and tolerances are read.

    Raises:
        InputError: the folder is not laid out like recordings.
    """

    def __init__(self, root: Path):
        self.root = root
        if not (root / "golden" / "verify_meta.json").is_file():
            raise InputError(f"{root}: contains no recordings (golden/verify_meta.json is missing)")
        self.meta: dict[str, Any] = read_json(root / "golden" / "verify_meta.json")

    def names(self) -> list[str]:
        """The files, such as ``02_transformer_cond`` and ``nvila/rope``."""
        return [prefix + file.stem for folder, prefix in FOLDERS for file in sorted((self.root / folder).glob("*.npz"))]

    def has(self, name: str) -> bool:
        return self._path(name).is_file()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Every array of a file."""
        try:
            with np.load(self._path(name)) as data:
                return {key: data[key] for key in data.files}
        except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
            raise InputError(f"{self._path(name)}: cannot be read as .npz ({error})") from error

    def json(self, name: str) -> Any:
        """The content of ``golden/<name>.json``."""
        return read_json(self.root / "golden" / f"{name}.json")

    def is_exempt(self, array: str) -> bool:
        """Whether the metadata exempts ``file/array``; of a file in a folder, also as ``folder/array``."""
        folder, *_, stage = array.split("/")
        names = {array, f"{folder}/{stage}"}
        return any(fnmatch(name, pattern) for name in names for pattern in self.meta.get("exempt", {}))

    @cached_property
    def transformer(self) -> FluxTransformer:
        """The transformer without a LoRA, in float32."""
        config = TRANSFORMER.read_config(self.root / "pipeline")
        files = TensorFiles.open(self.root / "pipeline" / TRANSFORMER.folder)
        return load_into(TRANSFORMER.abstract(config), TRANSFORMER.table_for(files, config), files, dtype=jnp.float32)

    def transformer_with_lora(self, scale: float) -> FluxTransformer:
        """The transformer with the recorded LoRA at a scale of alpha / rank."""
        network = jax.tree.map(lambda leaf: leaf, self.transformer)
        rank = self.meta["lora"]["rank"]
        return attach(network, read_lora(self.lora_path, alpha=scale * rank).adapters, dtype=jnp.float32)

    @cached_property
    def corrector(self) -> FluxTransformer:
        """The transformer with the LoRA at the scale of all recordings that name no other."""
        return self.transformer_with_lora(self.meta["lora"]["scale"])

    @cached_property
    def pipeline(self) -> Pipeline:
        """The whole model with the LoRA, in float32."""
        lora = self.meta["lora"]
        return load_pipeline(
            str(self.root / "pipeline"),
            lora=str(self.lora_path),
            lora_alpha=lora["scale"] * lora["rank"],
            dtype="float32",
            progress=False,
        )

    @property
    def lora_path(self) -> Path:
        return self.root / "lora" / "pytorch_lora_weights.safetensors"

    def numbered(self, name: str, pattern: str) -> Iterator[tuple[re.Match[str], np.ndarray]]:
        """The arrays of a file whose whole name a regular expression matches."""
        for key, value in self.arrays(name).items():
            if match := re.fullmatch(pattern, key):
                yield match, value

    def _path(self, name: str) -> Path:
        folder, prefix = next((pair for pair in reversed(FOLDERS) if name.startswith(pair[1])), FOLDERS[0])
        return self.root / folder / f"{name.removeprefix(prefix)}.npz"
