"""Samples a second of our reader, beside one built the way the original builds its own.

    python -m benchmarks.data   (its peer is an extra: pip install webdataset)

Both read the same shards with as many processes: pairs of 1024-pixel JPEGs, the subsets as often as in GenRef (14, 9,
18 and 59 %), drawn in the mixture of the training's second stage. The original has one pipeline for each subset; each
reads every shard, decodes every image, and then drops what is not of its subset. Here that is webdataset and Pillow,
with the same transforms. Its samples are counted where they are made; ours after they reached the consuming process.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import platform
import tarfile
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import SUBSETS, Record
from rflow_jax.data.shard_writer import write_record
from rflow_jax.data.sources.open import open_loader
from rflow_jax.data.transforms import pictures
from rflow_jax.testing.make_genref import FREQUENCIES

SECOND_STAGE = {"general": 0.3, "length": 0.3, "rule": 0.4, "editing": 0.0}
BATCH = 8
BICUBIC = Image.Resampling.BICUBIC


def photo(rng: np.random.Generator, size: int) -> bytes:
    """A JPEG with detail at every scale; at 1024 pixels about 0.75 MB, as GenRef's are on average.

    (209 shards of 8 GB hold 1.07 million pairs.)
    """
    total = np.zeros((size, size, 3), np.float32)
    side = 4
    while side <= size:
        layer = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((size, size), BICUBIC)
        total += (np.asarray(layer, np.float32) - 128) / side**0.2
        side *= 2
    scaled = 128 + total * (100 / np.abs(total).max())
    buffer = io.BytesIO()
    Image.fromarray(scaled.astype(np.uint8)).save(buffer, "JPEG", quality=98)
    return buffer.getvalue()


def write_shards(folder: Path, shards: int, samples: int, size: int) -> list[str]:
    """Shards whose pictures come from a small stock, so that making them does not take longer than reading."""
    rng = np.random.default_rng(0)
    stock = [photo(rng, size) for _ in range(12)]
    subsets = np.repeat(SUBSETS, (np.asarray(FREQUENCIES["natural"]) * shards * samples).round().astype(int))
    rng.shuffle(subsets)
    paths = []
    for shard, names in enumerate(np.array_split(subsets, shards)):
        paths.append(str(folder / f"{shard:03d}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for number, subset in enumerate(names):
                good, bad = (stock[i] for i in rng.choice(len(stock), 2, replace=False))
                record = Record(f"{shard:03d}_{number:05d}", str(subset), "a prompt", "a reflection", good, bad)
                write_record(tar, record)
    return paths


def theirs(sample: dict[str, Any], target: int, condition: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """The transforms of the original, on decoded pictures."""
    good, bad = sample["good_image.jpg"], sample["bad_image.jpg"]
    bad = bad.resize(good.size, BICUBIC)
    width, height = good.size
    size = (target, int(target * height / width)) if width <= height else (int(target * width / height), target)
    left, top = (int(rng.integers(0, room + 1)) for room in (size[0] - target, size[1] - target))
    box = (left, top, left + target, top + target)
    good, bad = (image.resize(size, BICUBIC).crop(box) for image in (good, bad))
    return np.asarray(good), np.asarray(bad.resize((condition, condition), BICUBIC))


def original_reader(paths: list[str], target: int, condition: int, seed: int, counter: Any, stop: Any) -> None:
    """One worker: four filtered pipelines over all shards, mixed at random."""
    import webdataset as wds  # pyright: ignore[reportMissingImports] (an extra)

    rng = np.random.default_rng(seed)

    def pipeline(name: str) -> Any:
        shards = wds.WebDataset(paths, shardshuffle=len(paths), seed=seed, empty_check=False).repeat()
        return iter(shards.decode("pil").select(lambda sample: sample["subset.txt"].strip() == name).shuffle(16))

    pipelines = {name: pipeline(name) for name, ratio in SECOND_STAGE.items() if ratio}
    names, ratios = list(pipelines), [SECOND_STAGE[name] for name in pipelines]
    while not stop.is_set():
        theirs(next(pipelines[rng.choice(names, p=ratios)]), target, condition, rng)
        with counter.get_lock():
            counter.value += 1


def measure_original(paths: list[str], target: int, condition: int, workers: int, seconds: float) -> float:
    """Samples a second, after the pipelines' buffers have filled."""
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("i", 0), context.Event()
    arguments = [(paths, target, condition, seed, counter, stop) for seed in range(workers)]
    processes = [context.Process(target=original_reader, args=one, daemon=True) for one in arguments]
    for process in processes:
        process.start()
    while counter.value < 4 * workers:
        if not all(process.is_alive() for process in processes):
            raise SystemExit("a worker of the original's reader died")
        time.sleep(0.05)
    begin, first = time.perf_counter(), counter.value
    time.sleep(seconds)
    rate = (counter.value - first) / (time.perf_counter() - begin)
    stop.set()
    for process in processes:
        process.terminate()
    return rate


def measure_ours(folder: Path, target: int, condition: int, workers: int, seconds: float) -> float:
    """Samples a second as the training loop gets them."""
    ratios = {name: [ratio] for name, ratio in SECOND_STAGE.items()}
    config = DataConfig(
        str(folder),
        split_ratios=ratios,
        training_stages=[0],
        target_size=target,
        condition_size=condition,
        workers=workers,
        cache=str(folder / "index"),
    )
    with open_loader(config, seed=0, batch_size=BATCH, slots=range(BATCH)) as loader:
        batches = iter(loader)
        list(islice(batches, config.prefetch + 2))
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            count += len(next(batches).prompts)
        return count / (time.perf_counter() - begin)


def largest_difference(size: int) -> int:
    """Of a pixel, between our transforms and Pillow's calls one by one, on pictures of unequal sizes."""
    rng, worst = np.random.default_rng(0), 0
    config = DataConfig("", target_size=size // 2, condition_size=size // 4, crop="center")
    for good_side, bad_side in ((size, size), (size, size * 3 // 4), (size // 2, size)):
        record = Record("k", "rule", "", "", photo(rng, good_side), photo(rng, bad_side))
        decoded = {name: Image.open(io.BytesIO(getattr(record, name))) for name in ("good_image", "bad_image")}
        sample = {f"{name}.jpg": image.convert("RGB") for name, image in decoded.items()}
        want = theirs(sample, config.target_size, config.condition_size, rng)
        for a, b in zip(pictures(record, config), want, strict=True):
            worst = max(worst, int(np.abs(a.astype(int) - b).max()))
    return worst


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=50, help="in each shard")
    parser.add_argument("--size", type=int, default=1024, help="pixels of the JPEGs, and of the target")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=40.0, help="for each reader")
    arguments = parser.parse_args()
    size, workers, seconds = arguments.size, arguments.workers, arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        paths = write_shards(Path(folder), arguments.shards, arguments.samples, size)
        original = measure_original(paths, size, size // 2, workers, seconds)
        ours = measure_ours(Path(folder), size, size // 2, workers, seconds)
    print(f"{platform.processor() or platform.machine()}, {workers} processes; Pillow {version('pillow')}, ", end="")
    print(f"webdataset {version('webdataset')}; JPEGs of {size} pixels, condition {size // 2}")
    print(f"{'reader':24s} samples/s   ratio")
    print(f"{'the original way':24s} {original:9.2f} {1:7.2f}")
    print(f"{'rflow_jax':24s} {ours:9.2f} {ours / original:7.2f}")
    print(f"largest difference to Pillow's bicubic: {largest_difference(size)}/255")


if __name__ == "__main__":
    main()
