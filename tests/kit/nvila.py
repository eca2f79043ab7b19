"""NVILA in PyTorch, put together from Transformers' modules: checkpoints of any size, and what they answer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from tests.kit.torch_models import randomise

EPS = 1e-5
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Sizes:
    """What differs from the recorded checkpoint."""

    vision: dict[str, Any]
    language: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    seed: int = 0


ANOTHER = Sizes(
    vision={
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 40,
        "patch_size": 8,
        "vision_use_head": True,
        "layer_norm_eps": 1e-4,
    },
    language={
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "vocab_size": 610,
        "tie_word_embeddings": False,
        "rope_theta": 5000.0,
    },
    config={"max_tiles": 6, "mm_vision_select_layer": -3},
)


class TorchNvila:
    """The three networks with random weights."""

    def __init__(self, sizes: Sizes):
        torch.manual_seed(sizes.seed)
        self.sizes = sizes
        self.tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes.vision))
        d, e = sizes.vision["hidden_size"], sizes.language["hidden_size"]
        self.projector = nn.Sequential(
            nn.Identity(), nn.LayerNorm(9 * d, EPS), nn.Linear(9 * d, 3 * d), nn.GELU(), nn.LayerNorm(3 * d, EPS),
            nn.Linear(3 * d, e), nn.GELU(), nn.Linear(e, e),
        )  # fmt: skip
        self.language = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes.language))
        for number, module in enumerate((self.tower, self.projector, self.language)):
            randomise(module, sizes.seed + number)
            for parameter in module.parameters():  # rounded, so that the file holds the same numbers
                parameter.data = parameter.data.to(sizes.dtype).float()

    def save(self, folder: Path, recorded: Path) -> None:
        """In VILA's layout; the tokenizer and what is not said here are the recorded checkpoint's."""
        shutil.copytree(recorded / "mm_projector", folder / "mm_projector", ignore=shutil.ignore_patterns("*.safe*"))
        layers = {f"layers.{key}": x for key, x in self._stored(self.projector).items()}
        save_file(layers, folder / "mm_projector" / "model.safetensors")
        for name, module in (("vision_tower", self.tower), ("llm", self.language)):
            # Not module.to: that would round the rotary frequencies too.
            module.save_pretrained(folder / name, state_dict=self._stored(module))
        for file in TOKENIZER:
            shutil.copy(recorded / "llm" / file, folder / "llm")
        side = self.sizes.vision["image_size"]
        _copy_json(recorded, folder, "vision_tower/preprocessor_config.json", size={"height": side, "width": side})
        _copy_json(recorded, folder, "config.json", **self.sizes.config)

    def _stored(self, module: nn.Module) -> dict[str, torch.Tensor]:
        return {key: x.to(self.sizes.dtype) for key, x in module.state_dict().items()}

    @torch.no_grad()
    def features(self, pixels: np.ndarray, layer: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """float32 [p, y, x, 3] -> (the tower's hidden states, its last with the norm, image tokens of one of them)."""
        out = self.tower(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
        states = [state.numpy() for state in out.hidden_states]
        return states, out.last_hidden_state.numpy(), self.project(states[layer])[-1]

    @torch.no_grad()
    def project(self, features: np.ndarray) -> list[np.ndarray]:
        """[p, patches, d] -> what leaves the space-to-depth and each layer."""
        p, patches, d = features.shape
        side = round(patches**0.5)
        square = torch.from_numpy(features).permute(0, 2, 1).reshape(p, d, side, side)
        square = nn.functional.pad(square, (0, -side % 3, 0, -side % 3))
        blocks = nn.functional.unfold(square, 3, stride=3)  # [p, d * 9, blocks]
        x = blocks.reshape(p, d, 9, -1).permute(0, 3, 2, 1).reshape(p, -1, 9 * d)
        stages = [x]
        for layer in list(self.projector.children())[1:]:
            stages.append(layer(stages[-1]))
        return [stage.numpy() for stage in stages]

    @torch.no_grad()
    def embed(self, ids: np.ndarray, feature: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The language model's input [t, d] of one question."""
        table = self.language.model.embed_tokens.weight.numpy(force=True)
        return np.where((feature >= 0)[:, None], tokens.reshape(-1, tokens.shape[-1])[feature], table[ids])

    @torch.no_grad()
    def answer(self, x: np.ndarray, steps: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input of one question -> (last hidden state, greedy tokens, logits of their steps); no token ends it."""
        inputs = torch.from_numpy(x)[None]
        tokens, logits, first = [], [], None
        for _ in range(steps):
            hidden = self.language.model(inputs_embeds=inputs).last_hidden_state[0, -1]
            first = hidden if first is None else first
            logits.append(self.language.lm_head(hidden)[:vocabulary])
            tokens.append(int(logits[-1].argmax()))
            made = self.language.get_input_embeddings()(torch.tensor([tokens[-1:]]))
            inputs = torch.cat([inputs, made], dim=1)
        assert first is not None
        return first.numpy(), np.asarray(tokens), torch.stack(logits).numpy()


def _copy_json(src: Path, dst: Path, name: str, **changes: Any) -> None:
    content = json.loads((src / name).read_text()) | changes
    (dst / name).write_text(json.dumps(content))
