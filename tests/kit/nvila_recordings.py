"""Recordings of NVILA at other sizes, laid out like the original's; the numbers are PyTorch's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from rflow_jax.models.nvila import Layout, ask, chat, message
from rflow_jax.tokenizers.nvila import NvilaTokenizer
from rflow_jax.weights.nvila import read_nvila_config
from tests.kit.compare import save_arrays
from tests.kit.nvila import Sizes, TorchNvila

IMAGES = {"one": (30, 30), "wide": (131, 40)}  # width, height
MODES: dict[str, Callable[[str], str]] = {
    "chat": lambda prompt: ask(prompt, "raw"),
    "plain": lambda prompt: ask(prompt, "raw"),
    "sana": lambda prompt: ask(prompt, "question"),
}
STEPS = 3


def record(folder: Path, golden: Path, sizes: Sizes) -> None:
    """Writes a checkpoint and its recordings below ``folder``."""
    network = TorchNvila(sizes)
    out = folder / "nvila" / "golden"
    out.mkdir(parents=True)
    (folder / "golden").mkdir()
    shutil.copy(golden / "golden" / "verify_meta.json", folder / "golden")
    network.save(folder / "nvila" / "checkpoint", golden / "nvila" / "checkpoint")
    config = read_nvila_config(folder / "nvila" / "checkpoint")
    tokenizer = NvilaTokenizer(folder / "nvila" / "checkpoint" / "llm", config.language)
    draw = np.random.default_rng(sizes.seed)
    meta = {"cases": {}}
    _projector(out, network, draw)
    powers = np.arange(0, config.language.head_dim, 2, dtype=np.float32) / config.language.head_dim
    frequencies = np.asarray(1 / config.language.rope_theta**powers, np.float32)
    np.savez(out / "rope.npz", inv_freq=frequencies, inv_freq_half=frequencies.astype(np.float16).astype(np.float32))
    for name, (width, height) in IMAGES.items():
        image = draw.integers(0, 256, (height, width, 3), np.uint8)
        tiles = config.tiling.cut(Image.fromarray(image))
        pixels = (tiles.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)
        states, last, projected = network.features(pixels, config.mm_vision_select_layer)
        np.savez(
            out / f"vision_{name}.npz",
            image=image,
            tiles_u8=tiles,
            pixel_values_01=pixels[:2].transpose(0, 3, 1, 2),
            tower=states[config.mm_vision_select_layer],
            **{f"tower_hidden{k}_tile0": state[0] for k, state in enumerate(states)},
            tower_last_hidden_tile0=last[0],
            projected=projected,
        )
        for mode, asked in MODES.items():
            case = {"image": name, "prompt": "a purple dog", "mode": mode}
            said = message([len(tiles), asked(case["prompt"])])
            text = said if mode == "plain" else chat(said)
            layout = tokenizer.layout(text, config.picture_tokens)
            meta["cases"][f"{name}_{mode}"] = case
            arrays = _case(network, tokenizer, layout, projected)
            save_arrays(out / f"case_{name}_{mode}.npz", arrays | {"input_ids": np.asarray(tokenizer.ids(text))})
    (out / "meta.json").write_text(json.dumps(meta))


def _projector(out: Path, network: TorchNvila, draw: np.random.Generator) -> None:
    arrays = {}
    for grid in (2, 5, 6):
        features = draw.standard_normal((2, grid**2, network.sizes.vision["hidden_size"]), np.float32)
        stages = network.project(features)
        arrays |= {f"g{grid}_in": features, f"g{grid}_down": stages[0], f"g{grid}_out": stages[-1]}
        arrays |= {f"g{grid}_layer{number}": stage for number, stage in enumerate(stages[1:], 1)}
    save_arrays(out / "projector.npz", arrays)


def _case(network: TorchNvila, tokenizer: NvilaTokenizer, layout: Layout, tokens: np.ndarray) -> dict[str, np.ndarray]:
    x = network.embed(layout.ids, layout.feature, tokens)
    hidden, made, logits = network.answer(x, STEPS, tokenizer.size)
    return {
        "embed_kind": layout.kind,
        "embed_tile": layout.picture,
        "embed_source": layout.source,
        "inputs_embeds": x,
        "attention_mask": np.ones(len(x), bool),
        "final_hidden_last": hidden,
        "logits_last": logits[0],
        "score_yes_no": logits[0][[tokenizer.yes, tokenizer.no]],
        "greedy_tokens": made,
        "greedy_logits": logits,
    }
