"""Recordings of Qwen2.5-VL and of a reward model in the layout of ``tests/golden/qwen``, of any size, by PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from rflow_jax.weights.reward_config import SPECIAL_TOKEN
from tests.kit.compare import save_arrays
from tests.kit.pictures import picture
from tests.kit.qwen import END, PAD, make

_CHAT = "<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
_LORA = r".*language_model.*(self_attn|mlp)\..*_proj"


@dataclass(frozen=True)
class QwenSizes:
    """What is recorded."""

    shape: dict[str, Any]
    pictures: Sequence[tuple[int, int]] = ((90, 130), (70, 60), (140, 40))
    texts: Sequence[str] = ("a cup", "two cups, left of a clock", "a photo of a blue bench")
    max_pixels: int = 9_000
    new_tokens: int = 5
    rank: int = 2
    alpha: int = 3
    rest: list[str] = field(default_factory=lambda: ["a red clock", "It's 2 cups"])


@torch.no_grad()
def record_qwen(root: Path, sizes: QwenSizes, tokenizer: Path) -> None:
    """Writes ``root/qwen``: models, texts and both files of arrays."""
    folder = root / "qwen"
    model = make(folder / "base", sizes.shape, tokenizer=tokenizer)
    (folder / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    rules = json.loads((folder / "base" / "preprocessor_config.json").read_text())
    processor = Qwen2VLImageProcessor(**rules)
    tokens = transformers.AutoTokenizer.from_pretrained(folder / "base")
    tokens.add_special_tokens({"additional_special_tokens": [*tokens.additional_special_tokens, SPECIAL_TOKEN]})
    factor = rules["patch_size"] * rules["merge_size"]
    images = [picture(*size, seed) for seed, size in enumerate(sizes.pictures)]
    resized = [_resized(image, factor, sizes.max_pixels) for image in images]
    seen = [processor(image, return_tensors="pt") for image in resized]
    chats: dict[str, list[str]] = {}
    for kind, end in (("base", ""), ("reward", f" {SPECIAL_TOKEN}")):
        pads = ["<|image_pad|>" * (int(one["image_grid_thw"].prod()) // rules["merge_size"] ** 2) for one in seen]
        chats[kind] = [_CHAT.format(pads=p, text=text + end) for p, text in zip(pads, sizes.texts, strict=True)]
    texts = {f"{kind}_chat_texts": own for kind, own in chats.items()} | {"special_token_ids": [len(tokens) - 1]}
    (folder / "texts.json").write_text(json.dumps(texts))
    pixels = {f"in_image{k}_uint8": np.asarray(image) for k, image in enumerate(images)}
    pixels |= {f"resized{k}_uint8": np.asarray(image) for k, image in enumerate(resized)}
    text_ids = tokens(sizes.rest, padding=True, return_tensors="np")["input_ids"]
    base = _base(
        model, _batch(tokens, chats["base"], seen), [_batch(tokens, *one) for one in _each(chats, seen)], sizes
    )
    save_arrays(folder / "golden_base.npz", pixels | base | {"input_ids_text": text_ids})
    reward = _reward(folder / "reward", model, tokens, chats["reward"], seen, sizes)
    save_arrays(folder / "golden_reward.npz", reward)


def _resized(image: Image.Image, factor: int, max_pixels: int) -> Image.Image:
    """What Qwen's utilities do before the processor (their rounding differs only for the tiniest pictures)."""
    height, width = smart_resize(image.height, image.width, factor, 4 * factor**2, max_pixels)
    return image.resize((width, height))


def _each(chats: dict, seen: Sequence[Any]) -> list[tuple[list[str], list[Any]]]:
    return [([chat], [one]) for chat, one in zip(chats["base"], seen, strict=True)]


def _batch(tokens: Any, chats: Sequence[str], seen: Sequence[Any]) -> dict[str, torch.Tensor]:
    encoded = tokens(list(chats), padding=True, padding_side="right", return_tensors="pt")
    pictures = {key: torch.cat([one[key] for one in seen]) for key in ("pixel_values", "image_grid_thw")}
    return {key: encoded[key] for key in ("input_ids", "attention_mask")} | pictures


def _base(model: Any, batch: dict, alone: Sequence[dict], sizes: QwenSizes) -> dict[str, np.ndarray]:
    visual, grid = model.model.visual, batch["image_grid_thw"]
    positions, deltas = model.model.get_rope_index(batch["input_ids"], grid, attention_mask=batch["attention_mask"])
    index, lengths = visual.get_window_index(grid)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    pictures = batch["input_ids"] == model.config.image_token_id
    embedded[pictures] = visual(batch["pixel_values"], grid_thw=grid)
    out = model(**batch, output_hidden_states=True)
    last = batch["attention_mask"].sum(1) - 1
    arrays = batch | {
        "vis_window_index": index,
        "vis_cu_window_seqlens": torch.tensor(lengths),
        "vis_patch_embed": visual.patch_embed(batch["pixel_values"]),
        "vis_rot_pos_emb": visual.rot_pos_emb(grid),
        "vis_out": visual(batch["pixel_values"], grid_thw=grid),
        "mrope_position_ids": positions,
        "rope_deltas": deltas,
        "last_hidden": out.hidden_states[-1],
        "hidden_embeds": embedded,
        "logits_last": out.logits[torch.arange(len(last)), last],
    }
    for k, one in enumerate(alone):
        how = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens, "do_sample": False}
        made = model.generate(
            **one, **how, eos_token_id=END, pad_token_id=PAD, return_dict_in_generate=True, output_logits=True
        )
        arrays |= {f"gen{k}_{key}": one[key] for key in ("input_ids", "pixel_values", "image_grid_thw")}
        arrays[f"gen{k}_new_tokens"] = made.sequences[:, one["input_ids"].shape[1] :]
        arrays[f"gen{k}_logits"] = torch.stack(made.logits, 1)
    return {key: value.numpy() for key, value in arrays.items()}


def _reward(
    folder: Path, model: Any, tokens: Any, chats: Sequence[str], seen: Sequence[Any], sizes: QwenSizes
) -> dict[str, np.ndarray]:
    model.resize_token_embeddings(len(tokens))
    width = sizes.shape["text_config"]["hidden_size"]
    model.rm_head = torch.nn.Linear(width, 1, bias=False)
    lora = peft.LoraConfig(r=sizes.rank, lora_alpha=sizes.alpha, target_modules=_LORA)
    wrapped = peft.get_peft_model(model, lora).eval()
    for name, parameter in wrapped.named_parameters():
        if any(part in name for part in ("lora_", "rm_head", "embed_tokens")):
            parameter.add_(0.3 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape))
    _save_reward(folder, wrapped, sizes)
    special = len(tokens) - 1
    batch = _batch(tokens, chats, seen)
    arrays = dict(batch)
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )
    arrays["mrope_position_ids"] = positions
    for suffix, places in (("", None), ("_mrope", positions)):
        hidden, rewards = _rewards(wrapped, batch, special, places)
        arrays[f"last_hidden{suffix}"] = hidden
        arrays |= {f"reward_{token}{suffix}": value for token, value in rewards.items()}
    for k, (chat, one) in enumerate(zip(chats, seen, strict=True)):
        _, rewards = _rewards(wrapped, _batch(tokens, [chat], [one]), special, None)
        arrays |= {f"reward_single{k}_{token}": value for token, value in rewards.items()}
    with wrapped.disable_adapter():
        arrays["reward_special_nolora"] = _rewards(wrapped, batch, special, None)[1]["special"]
    return {key: value.detach().numpy() for key, value in arrays.items()}


def _rewards(wrapped: Any, batch: dict, special: int, places: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
    places = torch.arange(ids.shape[1]).expand(3, len(ids), -1) if places is None else places
    hidden = wrapped.base_model.model.model(**batch, position_ids=places).last_hidden_state
    scores = wrapped.base_model.model.rm_head(hidden)
    return hidden, {
        "special": scores[ids == special],
        "last": torch.stack([row[n - 1] for row, n in zip(scores, lengths, strict=True)]),
        "mean": torch.stack([row[: n - 1].mean(0) for row, n in zip(scores, lengths, strict=True)]),
    }


def _save_reward(folder: Path, wrapped: Any, sizes: QwenSizes) -> None:
    step = folder / "checkpoint-2"
    wrapped.save_pretrained(step, save_embedding_layers=True)
    rest = {key: value for key, value in wrapped.state_dict().items() if "rm_head" in key}
    save_file(rest, step / "non_lora_state_dict.safetensors")
    config = {
        "data_config": {"max_frame_pixels": sizes.max_pixels},
        "model_config": {"model_name_or_path": "../base", "use_special_tokens": True, "reward_token": "special"},
        "peft_lora_config": {"lora_r": sizes.rank, "lora_alpha": sizes.alpha},
    }
    (folder / "model_config.json").write_text(json.dumps(config))
