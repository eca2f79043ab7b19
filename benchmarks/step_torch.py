"""The peer of :mod:`benchmarks.step`: a step of diffusers' FLUX with random weights on one GPU, eager and compiled.

    python -m benchmarks.step_torch [--size dev|part|tiny] [--batch 1] [--repeats 10]

Query, key and value products are fused, and attention is cuDNN's on a GPU, as users are told to do for speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.step import SIZES, TOKEN_PIXELS
from rflow_jax.models.flux.config import forward_flops


def main() -> None:
    """Prints rows in the form of :mod:`benchmarks.step`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="dev")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise SystemExit(f"the peer is left out: {error}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}, {device}", flush=True)
    with torch.no_grad():
        network = make_network(arguments.size, device)
        for batch in arguments.batch:
            given = inputs(arguments.size, batch, device)
            for name in ("eager", "torch.compile"):
                run = torch.compile(network) if name == "torch.compile" else network
                row(f"diffusers, {name}", arguments, batch, lambda run=run, given=given: run(**given))


def make_network(size: str, device: str) -> Any:
    """diffusers' transformer with random bfloat16 weights made on the device."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    config = dataclasses.asdict(SIZES[size][0])
    for constant in ("mlp_ratio", "rope_theta"):  # diffusers has them in its code
        del config[constant]
    with torch.device("meta"):
        network: Any = FluxTransformer2DModel(**config)
    network = network.to(torch.bfloat16).to_empty(device=device).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    network.fuse_qkv_projections()
    if device == "cuda" and hasattr(network, "set_attention_backend"):
        network.set_attention_backend("_native_cudnn")
    return network


def inputs(size: str, batch: int, device: str) -> dict[str, Any]:
    """Random arguments of one step without a condition."""
    import torch

    config, side, _, text = SIZES[size]
    image = (side // TOKEN_PIXELS) ** 2

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    ids = torch.zeros(image, 3, device=device)
    ids[:, 1] = torch.arange(image, device=device) // (side // TOKEN_PIXELS)
    ids[:, 2] = torch.arange(image, device=device) % (side // TOKEN_PIXELS)
    return {
        "hidden_states": draw(batch, image, config.in_channels),
        "encoder_hidden_states": draw(batch, text, config.joint_attention_dim),
        "pooled_projections": draw(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=torch.bfloat16),
        "guidance": torch.full((batch,), 3.5, device=device) if config.guidance_embeds else None,
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def row(name: str, arguments: argparse.Namespace, batch: int, step: Callable[[], Any]) -> None:
    """Measures one variant after a warm-up and prints it."""
    import torch

    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    begin = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - begin
    for _ in range(2):
        step()
    times = []
    for _ in range(arguments.repeats):
        wait()
        begin = time.perf_counter()
        for _ in range(5):
            step()
        wait()
        times.append((time.perf_counter() - begin) / 5)
    seconds, (config, side, _, text) = statistics.median(times), SIZES[arguments.size]
    flops = batch * forward_flops(config, text=text, image=(side // TOKEN_PIXELS) ** 2)
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0
    print(
        f"{name:26s} {batch:5d} {'no':9s} {seconds * 1e3:8.2f} {seconds * 1e3 / batch:14.2f} "
        f"{(max(times) - min(times)) * 1e3:7.2f} {flops / seconds / 1e12:8.0f} {first:10.1f} {gib:9.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
