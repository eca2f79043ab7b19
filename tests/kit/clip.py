"""A tiny CLIP with random weights, as Transformers lays it out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rflow_jax.models.clip import Clip
from rflow_jax.weights.components import read_clip_config
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import parameter_values
from rflow_jax.weights.mappings.text_encoders import CLIP_WHOLE
from tests.kit.encoders import random_model

SIDE = 20
TEXT = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": 5}
PROCESSOR = {
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.48, 0.45, 0.4],
    "image_std": [0.26, 0.26, 0.27],
}


def make_clip(folder: Path, golden: Path) -> Path:
    """Writes it and returns its folder; the tokenizer is the recordings'."""
    shutil.copytree(golden / "pipeline" / "tokenizer", folder)
    words = json.loads((golden / "pipeline" / "text_encoder" / "config.json").read_text())
    text = TEXT | {key: words[key] for key in ("vocab_size", "eos_token_id")}
    config = {"model_type": "clip", "text_config": text, "vision_config": VISION, "projection_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    network = random_model(Clip, read_clip_config(folder))
    values = {path: np.asarray(value) for path, value in parameter_values(network).items()}
    the_plan = plan(CLIP_WHOLE, {path: value.shape for path, value in values.items()})
    tensors = {key: the_plan.join(key, values) for key in the_plan.entries}
    tensors["logit_scale"] = np.asarray(np.log(100), np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})  # Transformers reads no file without it
    return folder
