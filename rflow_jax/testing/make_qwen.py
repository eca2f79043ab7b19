"""Writes a Qwen2.5-VL folder of the true shapes as on the Hub, and a reward model on it, with random weights.

    python -m rflow_jax.testing.make_qwen DST [--size 7b|3b|tiny] [--seed 0]

``DST/base`` is the model, ``DST/reward`` the reward checkpoint. Speed and memory can be measured with them where the
real weights are not at hand; their answers mean nothing. The tokenizer is the small one of ``tests/golden/qwen``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.models.qwen2_5_vl.config import MROPE_SECTION, Qwen25VLConfig, VisionConfig
from rflow_jax.models.qwen2_5_vl.model import abstract_qwen2_5_vl
from rflow_jax.testing.make_flux import GB, Noise, TensorFile, shards, write_json, write_tensors
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings.qwen import qwen2_5_vl_mapping
from rflow_jax.weights.qwen import published_config

TOKENIZER = Path(__file__).parent / "models" / "tiny-qwen2.5-vl"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "generation_config.json")
STEP = "checkpoint-1"
HEAD = "rm_head.weight"

_TINY = Qwen25VLConfig(
    Qwen2Config(520, 64, 96, 2, 4, 2, mrope_section=(2, 3, 3)),
    VisionConfig(4, 32, 48, 2, out_hidden_size=64, fullatt_block_indexes=(1, 3)),
)
_3B = Qwen25VLConfig(
    Qwen2Config(151_936, 2048, 11_008, 36, 16, 2, tie_word_embeddings=True, mrope_section=MROPE_SECTION),
    VisionConfig(out_hidden_size=2048),
)
SIZES = {"7b": Qwen25VLConfig(), "3b": _3B, "tiny": _TINY}


def make(dst: Path, *, size: str = "7b", seed: int = 0, shard_gb: float = 4) -> int:
    """Writes both folders and returns the bytes of their tensors.

    Raises:
        FileExistsError: ``dst`` holds something already.
        OSError: not enough room on the disk.
    """
    config = SIZES[size]
    if dst.exists() and any(dst.iterdir()):
        raise FileExistsError(f"{dst}: not empty; remove it, or name another folder")
    base, step = dst / "base", dst / "reward" / STEP
    files = shards(base, "model", shapes_of(config), int(shard_gb * GB))
    head = {HEAD: (1, config.language.hidden_size)}
    files.append(TensorFile(step / "non_lora_state_dict.safetensors", head, "F32"))
    total = sum(file.nbytes for file in files)
    dst.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(dst).free) < total:
        raise OSError(f"{dst}: {total / GB:.1f} GB needed, {free / GB:.1f} GB free")
    write_tensors(files, Noise(seed))
    write_json(base / "config.json", config_json(config))
    for name in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, base / name)
    write_json(base / "preprocessor_config.json", preprocessor_json(config))
    model = {"model_name_or_path": "../base", "output_dim": 1, "reward_token": "last", "use_special_tokens": False}
    write_json(dst / "reward" / "model_config.json", {"model_config": model})
    return total


def shapes_of(config: Qwen25VLConfig) -> dict[str, tuple[int, ...]]:
    """Published key -> shape of every tensor."""
    model = abstract_qwen2_5_vl(config)
    whole = plan(qwen2_5_vl_mapping((), head=model.language.head is not None), parameter_shapes(model))
    return {key: whole.their_shape(key) for key in whole.entries}


def config_json(config: Qwen25VLConfig) -> dict[str, Any]:
    """``config.json`` in the published layout, with the tokens of the small tokenizer."""
    tokens = {
        name: id for name, id in json.loads((TOKENIZER / "config.json").read_text()).items() if "token_id" in name
    }
    return published_config(config, "bfloat16", tokens)


def preprocessor_json(config: Qwen25VLConfig) -> dict[str, Any]:
    """``preprocessor_config.json`` as it is published."""
    rules = json.loads((TOKENIZER / "preprocessor_config.json").read_text())
    unit = (config.vision.patch_size * config.vision.spatial_merge_size) ** 2
    return rules | {"min_pixels": 4 * unit, "max_pixels": 16_384 * unit}


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the model that the command line describes; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dst", type=Path, help="folder to write")
    parser.add_argument("--size", choices=sorted(SIZES), default="7b")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(argv))
    begin = time.perf_counter()
    try:
        total = make(options.pop("dst"), **options)
    except OSError as error:
        print(f"make_qwen: {error}", file=sys.stderr)
        return 2
    print(f"{total:,} bytes in {time.perf_counter() - begin:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
