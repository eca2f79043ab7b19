"""Scores a second of NVILA-Lite-2B-Verifier's shape, with random weights drawn on the device.

    python -m benchmarks.nvila [--size 2b|tiny] [--batch 1 4 8] [--images 16] [--side 1024] [--repeats 3]

A table: number type, batch, images a second from pictures in host memory to verdicts, seconds of the first call,
accelerator memory held and at its peak. The last line says how near bfloat16's margins (yes minus no) are to those of
the same weights in float32. The tokenizer is the small one of ``tests/golden/nvila``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from rflow_jax.models.nvila import NvilaConfig, abstract_nvila
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.siglip import SiglipVisionConfig
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.tokenizers.nvila import NvilaTokenizer
from rflow_jax.verifiers.config import NvilaVerifierConfig
from rflow_jax.verifiers.nvila import NvilaVerifier
from rflow_jax.weights.nvila import LANGUAGE, NvilaModel

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "nvila" / "checkpoint" / LANGUAGE
SIZES = {
    "2b": NvilaConfig(
        SiglipVisionConfig(1152, 4304, 27, 16, image_size=448, patch_size=14),
        Qwen2Config(151_648, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    ),
    "tiny": NvilaConfig(
        SiglipVisionConfig(32, 48, 3, 2, image_size=56, patch_size=14), Qwen2Config(640, 64, 96, 2, 4, 2)
    ),
}


def random_model(config: NvilaConfig) -> NvilaModel:
    """A model whose every number is drawn on the device, in bfloat16."""
    graph, state = nnx.split(abstract_nvila(config, jnp.bfloat16))

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, shape: tuple[int, ...], around: int) -> jax.Array:
        return around + jax.random.normal(key, shape, jnp.bfloat16) * (shape[0] ** -0.5)

    flat = nnx.to_flat_state(state)
    keys = jax.random.split(jax.random.key(0), len(flat))
    drawn = [
        (path, leaf.replace(draw(key, leaf.shape, int(path[-1] == "scale"))))  # norms scale by about one
        for key, (path, leaf) in zip(keys, flat, strict=True)
    ]
    weights = nnx.from_flat_state(drawn)
    levels = np.repeat(np.linspace(-1, 1, 256, dtype=np.float32)[:, None], 3, axis=1)
    return NvilaModel("random", config, graph, weights, NvilaTokenizer(TOKENIZER, config.language), levels)


def measure(model: NvilaModel, batch: int, images: list[Image.Image], repeats: int) -> np.ndarray:
    """Prints a row; returns the margins."""
    dtype = jax.tree.leaves(model.weights)[0].dtype
    verifier = NvilaVerifier(NvilaVerifierConfig(batch_size=batch, rank="margin", dtype=str(dtype)), model)
    items = [{"prompt": f"a photo of {k} apples"} for k in range(len(images))]
    seconds, verdicts = [], []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        verdicts = verifier.score(images, items)
        seconds.append(time.perf_counter() - begin)
    if errors := {verdict.error for verdict in verdicts if verdict.error}:
        raise SystemExit(f"no scores: {errors}")
    stats = jax.devices()[0].memory_stats() or {}
    held, peak = (stats.get(name, 0) / 2**30 for name in ("bytes_in_use", "peak_bytes_in_use"))
    rate = len(images) / statistics.median(seconds[1:])
    print(f"{dtype!s:9s} {batch:5d} {rate:9.1f} {seconds[0]:13.1f} {held:9.1f} {peak:5.1f}", flush=True)
    return np.array([verdict.score for verdict in verdicts])


def main() -> None:
    """bfloat16 at each batch, then float32 at the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    colours = np.random.default_rng(0).integers(0, 256, (arguments.images, 8, 8, 3), np.uint8)
    images = [Image.fromarray(one).resize((arguments.side,) * 2, Image.Resampling.BICUBIC) for one in colours]
    model = random_model(SIZES[arguments.size])
    pictures = len(model.config.tiling.cut(images[0]))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {pictures} pictures an image", flush=True)
    print("type      batch  images/s  first call s  held, peak GiB", flush=True)
    found = [measure(model, batch, images, arguments.repeats) for batch in arguments.batch]
    with reproducible(jnp.float32):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), model.weights)
        exact = NvilaModel(model.name, model.config, model.graph, wide, model.tokenizer, model.levels)
        want = measure(exact, arguments.batch[-1], images, 1)
    apart = np.abs(found[-1] - want).max() / want.std()
    print(f"margins: correlation {np.corrcoef(found[-1], want)[0, 1]:.4f}, farthest apart {apart:.3f} deviations")
    print("batches agree:", all(np.allclose(one, found[-1], atol=0.1 * want.std()) for one in found))


if __name__ == "__main__":
    main()
