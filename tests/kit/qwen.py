"""Tiny Qwen2.5-VLs of Transformers with random weights, in folders as they are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.kit.torch_models import randomise

TOKENS = {"image_token_id": 502, "video_token_id": 503, "vision_start_token_id": 499, "vision_end_token_id": 500}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.json")
END, PAD = 496, 497

# As in the recordings: heads of 16 channels, windows of 4 x 4 units of 2 x 2 patches.
USUAL: dict[str, Any] = {
    "text_config": {
        "vocab_size": 520,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3],
    },
    "tie_word_embeddings": False,
}
# Units of 3 x 3 patches in windows of 2 x 2 units, one key head for all, tied embeddings.
OTHER: dict[str, Any] = {
    "text_config": {
        "vocab_size": 505,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_heads": 3,
        "out_hidden_size": 36,
        "patch_size": 6,
        "spatial_merge_size": 3,
        "window_size": 36,
        "fullatt_block_indexes": [2],
    },
    "tie_word_embeddings": True,
}
SHAPES = {"usual": USUAL, "units of nine": OTHER}


def make(folder: Path, shape: dict[str, Any], *, tokenizer: Path, seed: int = 0) -> Any:
    """Saves a model in shards, with tokenizer and preprocessor, and returns Transformers' module."""
    torch.manual_seed(seed)
    config = transformers.Qwen2_5_VLConfig(**shape, **TOKENS)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    randomise(model, seed + 1)
    model.save_pretrained(folder, max_shard_size="150KB")
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    vision = config.vision_config
    factor = vision.patch_size * vision.spatial_merge_size
    rules = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "min_pixels": 4 * factor**2,
        "max_pixels": 100 * factor**2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(rules))
    return model.eval()
