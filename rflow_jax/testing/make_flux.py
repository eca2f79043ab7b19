"""Writes a FLUX.1 folder of the true shapes as on the Hub, with random weights, and a corrector LoRA.

    python -m rflow_jax.testing.make_flux DST [--size dev|schnell|tiny] [--seed 0] [--shard_gb 10] [--lora_rank 32]

Loading, memory and speed can be measured with it where the real weights are not at hand. Its pictures mean
nothing. Needs numpy, ml_dtypes and rich. The tokenizers are the small ones of ``tests/golden/pipeline``.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from rflow_jax.testing.flux_layout import (
    CHANGES,
    Shapes,
    clip_shapes,
    configs,
    lora_shapes,
    t5_shapes,
    transformer_shapes,
    vae_shapes,
)
from rflow_jax.weights.published import MODEL_INDEX

TOKENIZERS = Path(__file__).parent / "models" / "tiny-flux"
GB = 10**9
CHUNK = 2**20  # numbers scaled and written at once: small enough to stay in a core's cache
BLOCK = 2**25 - 39  # random bfloat16 numbers to cut tensors from (64 MB); odd, so that rows don't repeat
WIDE_BLOCK = 2**22 - 3  # the same for float32 (16 MB)
SMALLEST = 2.0**-20  # |number| in a block: keeps every exponent clear of zero when it is lowered
MANTISSA_BITS = 7  # of a bfloat16: its exponent begins above them
ITEMSIZE = {"BF16": 2, "F32": 4}


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file to be written."""

    path: Path
    shapes: Shapes
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        return ITEMSIZE[self.dtype] * sum(math.prod(shape) for shape in self.shapes.values())


class Noise:
    """Normal numbers for a tensor of any size, cut out of one random block at an offset that its key decides.

    Drawing 17 billion normals would take minutes. Standard deviations are powers of two, so that bfloat16
    numbers are scaled by lowering their exponent bits, an integer subtraction.
    """

    def __init__(self, seed: int):
        rng = np.random.Generator(np.random.SFC64(seed))
        self.seed = seed
        self.wide = _away_from_zero(rng.standard_normal(WIDE_BLOCK, np.float32))
        self.bits = np.empty(BLOCK, np.uint16)
        for start in range(0, BLOCK, CHUNK):
            part = self.bits[start : start + CHUNK]
            numbers = _away_from_zero(rng.standard_normal(part.size, np.float32))
            part[:] = numbers.astype(ml_dtypes.bfloat16).view(np.uint16)

    def chunks(self, key: str, shape: tuple[int, ...], dtype: str) -> Iterator[np.ndarray]:
        """The tensor's numbers in order, in pieces; a piece is valid until the next one is asked for."""
        if key.endswith(".weight") and len(shape) == 1:  # a norm's scale
            near_one = 1 + 2.0**-6 * self.wide[: shape[0]]
            yield near_one.astype(ml_dtypes.bfloat16 if dtype == "BF16" else np.float32)
            return
        lower = log2_inverse_std(key, shape)
        block = self.bits if dtype == "BF16" else self.wide
        buffer = np.empty(CHUNK, block.dtype)
        for piece in self._pieces(key, math.prod(shape), block):
            out = buffer[: piece.size]
            if dtype == "BF16":
                yield np.subtract(piece, np.uint16(lower << MANTISSA_BITS), out=out)
            else:
                yield np.multiply(piece, np.float32(2.0**-lower), out=out)

    def _pieces(self, key: str, count: int, block: np.ndarray) -> Iterator[np.ndarray]:
        start = zlib.crc32(f"{self.seed} {key}".encode()) % block.size
        while count:
            piece = block[start : start + min(count, CHUNK)]
            yield piece
            count -= piece.size
            start = (start + piece.size) % block.size


def log2_inverse_std(key: str, shape: tuple[int, ...]) -> int:
    """k of the standard deviation 2^-k: near 1 / sqrt(fan in), so that activations stay finite."""
    if key == "shared.weight":  # T5 normalises its embeddings
        return 0
    if key.endswith(".bias") or "embedding.weight" in key:
        return 6
    if key.endswith(".lora_B.weight"):  # trained: not zero, and a small part of the base's output
        return 7
    if key.endswith(".lora_A.weight"):
        return round(math.log2(shape[0]))
    k = math.ceil(math.log2(math.prod(shape[1:])) / 2)
    # T5 does not divide its logits by sqrt(64); its weights do.
    return k + 3 if key.endswith(".SelfAttention.q.weight") else k


def make(dst: Path, *, size: str = "dev", seed: int = 0, shard_gb: int | float = 10, lora_rank: int = 32) -> int:
    """Writes the folder and returns the bytes of its tensors.

    Raises:
        FileExistsError: ``dst`` holds something already.
        OSError: not enough room on the disk.
    """
    files = plan_files(dst, size=size, shard_gb=shard_gb, lora_rank=lora_rank)
    total = sum(file.nbytes for file in files)
    if dst.exists() and any(dst.iterdir()):
        raise FileExistsError(f"{dst}: not empty; remove it, or name another folder")
    dst.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(dst).free) < total:
        raise OSError(f"{dst}: {total / GB:.1f} GB needed, {free / GB:.1f} GB free")
    write_small_files(dst, size)
    write_tensors(files, Noise(seed))
    return total


def plan_files(dst: Path, *, size: str, shard_gb: int | float, lora_rank: int) -> list[TensorFile]:
    """Every tensor file of the folder. T5 is cut at half the transformer's limit, as on the Hub."""
    config = configs(size)
    diffusers, limit = "diffusion_pytorch_model", int(shard_gb * GB)
    lora = lora_shapes(config["transformer"], lora_rank)
    return [
        *shards(dst / "transformer", diffusers, transformer_shapes(config["transformer"]), limit),
        *shards(dst / "text_encoder", "model", clip_shapes(config["text_encoder"]), limit),
        *shards(dst / "text_encoder_2", "model", t5_shapes(config["text_encoder_2"]), limit // 2),
        *shards(dst / "vae", diffusers, vae_shapes(config["vae"]), limit),
        TensorFile(dst / "lora" / "pytorch_lora_weights.safetensors", lora, "F32"),
    ]


def shards(folder: Path, stem: str, shapes: Shapes, limit: int) -> list[TensorFile]:
    """Cuts a state dict, in its order, into files of at most ``limit`` bytes (or one tensor)."""
    parts: list[Shapes] = [{}]
    room = limit
    for key, shape in shapes.items():
        nbytes = ITEMSIZE["BF16"] * math.prod(shape)
        if nbytes > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][key] = shape
        room -= nbytes
    if len(parts) == 1:
        return [TensorFile(folder / f"{stem}.safetensors", shapes)]
    names = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    return [TensorFile(folder / name, part) for name, part in zip(names, parts, strict=True)]


def write_small_files(dst: Path, size: str) -> None:
    """model_index.json, the configurations and the tokenizers."""
    write_json(dst / "model_index.json", MODEL_INDEX)
    for part, config in configs(size).items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        write_json(dst / part / name, config)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TOKENIZERS / part, dst / part)


def write_tensors(files: Sequence[TensorFile], noise: Noise) -> None:
    """Writes all files, a thread each (largest first), behind a progress bar."""
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(min(8, len(files))) as pool:
        task = progress.add_task("", total=sum(file.nbytes for file in files))
        ordered = sorted(files, key=lambda file: -file.nbytes)
        advance = partial(progress.advance, task)
        for done in [pool.submit(write_file, file, noise, advance) for file in ordered]:
            done.result()
    for folder in {file.path.parent for file in files}:
        write_index(folder, [file for file in files if file.path.parent == folder])


def write_file(file: TensorFile, noise: Noise, advance: Callable[[int], object]) -> None:
    """One safetensors file: 8 bytes of header length, the header, the tensors by name."""
    file.path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in sorted(file.shapes):
        start, end = end, end + ITEMSIZE[file.dtype] * math.prod(file.shapes[key])
        header[key] = {"dtype": file.dtype, "shape": file.shapes[key], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file.path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key in sorted(file.shapes):
            for chunk in noise.chunks(key, file.shapes[key], file.dtype):
                stream.write(chunk.view(np.uint8).data)
            advance(ITEMSIZE[file.dtype] * math.prod(file.shapes[key]))


def write_index(folder: Path, files: Sequence[TensorFile]) -> None:
    """``*.safetensors.index.json``, where a folder has more than one file."""
    if len(files) == 1:
        return
    stem = files[0].path.name.split("-00001")[0]
    weight_map = {key: file.path.name for file in files for key in file.shapes}
    index = {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, content: object) -> None:
    """Writes an indented JSON file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _away_from_zero(numbers: np.ndarray) -> np.ndarray:
    small = np.abs(numbers) < SMALLEST
    numbers[small] = SMALLEST
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the model that the command line describes; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument("--size", choices=sorted(CHANGES), default="dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard_gb", type=float, default=10, help="largest file in GB (T5: half of it)")
    parser.add_argument("--lora_rank", type=int, default=32)
    options = vars(parser.parse_args(argv))
    begin = time.perf_counter()
    try:
        total = make(options.pop("dst"), **options)
    except OSError as error:
        print(f"make_flux: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - begin
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(
        f"{total:,} bytes in {seconds:.1f} s: {total / GB / seconds:.2f} GB/s (page cache included), "
        f"peak resident memory {peak / GB:.2f} GB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
