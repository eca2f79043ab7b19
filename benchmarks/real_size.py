"""Loading and generating at FLUX.1-dev's true size, with random weights: time, memory, cold and warm start.

    python -m benchmarks.real_size FOLDER [--batch 1 4] [--steps 30] [--side 1024]

FOLDER is written by ``python -m rflow_jax.testing.make_flux FOLDER``. First ``infer.py generate`` runs twice as a user
would run it, with an empty and with a filled compilation cache; then one process loads the model and times batches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from rflow_jax import Pipeline, load_pipeline
from rflow_jax.generation.config import SamplingConfig

PROMPT = "a photo of two red apples and a bench"
REFLECTION = "Make the second apple larger."


class HostMemory(threading.Thread):
    """The most anonymous memory (all but the page cache) that a process has had, in GB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status, self.peak, self.running = Path(f"/proc/{pid}/status"), 0.0, True

    def run(self) -> None:
        while self.running:
            try:
                text = self.status.read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024 / 1e9)
            time.sleep(0.02)

    def stop(self) -> float:
        self.running = False
        return self.peak


def command_line(folder: Path, out: Path, condition: Path, cache: Path, steps: int, side: int) -> None:
    """``infer.py generate`` from process start to its image on disk."""
    command = [sys.executable, "infer.py", "generate", "--model", str(folder), "--lora", str(folder / "lora")]
    command += ["--prompt", PROMPT, "--condition", str(condition), "--reflection", REFLECTION]
    command += ["--num_inference_steps", str(steps), "--out", str(out)]
    command += ["--height", str(side), "--width", str(side), "--condition_size", str(side // 2)]
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)})
    memory = HostMemory(process.pid)
    memory.start()
    if process.wait():
        raise SystemExit(f"infer.py ended with status {process.returncode}")
    print(
        f"infer.py generate, {out.name}: {time.perf_counter() - begin:.1f} s to the first image, "
        f"host memory {memory.stop():.1f} GB beyond the page cache",
        flush=True,
    )


def in_process(folder: Path, condition: Path, batches: list[int], steps: int, side: int) -> None:
    """Load time, then batches of each size: the first (compiling) and the second."""
    memory = HostMemory(os.getpid())
    memory.start()
    begin = time.perf_counter()
    pipe = load_pipeline(str(folder), lora=str(folder / "lora"), progress=False)
    jax.block_until_ready(pipe.bundle.weights)
    seconds = time.perf_counter() - begin
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.bundle.weights))
    print(
        f"load: {nbytes / 1e9:.1f} GB in {seconds:.1f} s, {nbytes / 1e9 / seconds:.2f} GB/s, "
        f"host memory {memory.stop():.1f} GB beyond the page cache",
        flush=True,
    )
    picture = Image.open(condition)
    for batch in batches:
        for conditioned in (True, False):
            settings = SamplingConfig(
                height=side, width=side, condition_size=side // 2, batch_size=batch, num_inference_steps=steps
            )
            report(pipe if conditioned else pipe.without_lora(), picture if conditioned else None, settings)


def report(pipe: Pipeline, picture: Image.Image | None, settings: SamplingConfig, repeats: int = 3) -> None:
    """Times batches of one kind; each repeat shifts the samples by a slot, which must not change a bit of them."""
    batch, steps = settings.batch_size, settings.num_inference_steps
    times, made = [], []
    for repeat in range(repeats):
        order = [(slot + repeat) % batch for slot in range(batch)]
        begin = time.perf_counter()
        images = pipe.generate(
            [f"{PROMPT}, number {sample}" for sample in order],
            seeds=order,
            conditions=[picture.rotate(90 * sample) for sample in order] if picture else None,
            reflections=[REFLECTION] * batch if picture else None,
            settings=settings,
        )
        times.append(time.perf_counter() - begin)
        made.append({sample: np.asarray(image) for sample, image in zip(order, images, strict=True)})
    assert all(image.std() > 0 for image in made[0].values()), "a flat picture: something broke"
    equal = all(np.array_equal(other[sample], made[0][sample]) for other in made for sample in range(batch))
    stats = jax.devices()[0].memory_stats() or {}
    kind = f"{settings.condition_size} px condition" if picture else "no condition"
    print(
        f"batch {batch}, {kind}: first {times[0]:.1f} s, then {min(times[1:]):.2f} s a batch = "
        f"{min(times[1:]) / batch / steps * 1e3:.1f} ms a step and image (encoding and decoding included); "
        f"device memory peak {stats.get('peak_bytes_in_use', 0) / 2**30:.1f} GiB; "
        f"{'bit-equal in every slot' if equal else 'NOT EQUAL between slots'}",
        flush=True,
    )


def main() -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--side", type=int, default=1024, help="of the picture; the condition has half of it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        condition = work / "bad.png"
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).resize((arguments.side,) * 2, Image.Resampling.BICUBIC).save(condition)
        for run in ("cold", "warm"):
            command_line(arguments.folder, work / run, condition, work / "cache", arguments.steps, arguments.side)
        jax.config.update("jax_compilation_cache_dir", str(work / "cache"))
        in_process(arguments.folder, condition, arguments.batch, arguments.steps, arguments.side)


if __name__ == "__main__":
    main()
