"""Recordings of Qwen2.5-VL and of the reward model on it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from rflow_jax.models.qwen2.generate import Decoding
from rflow_jax.models.qwen2_5_vl.layout import window_order
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL
from rflow_jax.models.qwen2_5_vl.vision import rope_angles
from rflow_jax.verify.recording import Recording
from rflow_jax.vlm.qwen import Scoring, embed, hidden_states, rewards, texts
from rflow_jax.vlm.qwen_images import ImageRules, fitted, limited, normalised, patches_of
from rflow_jax.vlm.qwen_inputs import Inputs, Sample, batch_of
from rflow_jax.vlm.qwen_text import QwenTokenizer
from rflow_jax.weights.components import read_json, read_object
from rflow_jax.weights.qwen import end_tokens, load_qwen
from rflow_jax.weights.reward import SPECIAL_TOKEN, RewardCheckpoint

BASE, REWARD = "qwen/golden_base", "qwen/golden_reward"
_REWARD = re.compile(r"reward_(?:single(?P<alone>\d+)_)?(?P<token>special|last|mean)(?P<how>_mrope|_nolora)?")
Result = tuple[str, Any]


@dataclass(frozen=True)
class Recorded:
    """The recorded pictures and texts, prepared by our own code."""

    recording: Recording

    @cached_property
    def folder(self) -> Path:
        return self.recording.root / "qwen"

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return self.recording.arrays(BASE)

    @cached_property
    def checkpoint(self) -> RewardCheckpoint:
        return RewardCheckpoint.open(self.folder / "reward")

    @cached_property
    def rules(self) -> ImageRules:
        return ImageRules.from_json(read_object(self.folder / "base" / "preprocessor_config.json"))

    @cached_property
    def resized(self) -> list[Image.Image]:
        """The pictures, as they come to the processor."""
        found = sorted((int(m[1]), pixels) for m, pixels in self.recording.numbered(BASE, r"in_image(\d+)_uint8"))
        limit = self.checkpoint.config.max_pixels
        return [limited(Image.fromarray(pixels), limit, self.rules.factor) for _, pixels in found]

    def samples(self, tokenizer: QwenTokenizer, kind: str) -> list[Sample]:
        """A sample a picture."""
        chats = read_json(self.folder / "texts.json")[f"{kind}_chat_texts"]
        pictures = [patches_of(fitted(image, self.rules), self.rules) for image in self.resized]
        return [Sample(tokenizer.encode(text), (one,)) for text, one in zip(chats, pictures, strict=True)]

    def inputs(self, samples: Sequence[Sample], model: Qwen25VL, tokenizer: QwenTokenizer) -> Inputs:
        """The batch, padded as the recording was: to its longest."""
        return batch_of(samples, model.config, pad=tokenizer.pad, rows=len(samples), exact=True)


def base(recording: Recording) -> Iterator[Result]:
    """The model itself: preparation, tower, positions, hidden states, logits, greedy tokens."""
    known = Recorded(recording)
    tokenizer = QwenTokenizer(known.folder / "base")
    model = load_qwen(known.folder / "base", dtype=jnp.float32)
    for k, image in enumerate(known.resized):
        yield f"resized{k}_uint8", np.asarray(image)
    yield "input_ids_text", _encoded_again(tokenizer, known.arrays["input_ids_text"])
    samples = known.samples(tokenizer, "base")
    inputs = known.inputs(samples, model, tokenizer)
    yield from _prepared(samples, inputs, known.rules)
    yield from _tower(model, samples, inputs, known.rules)
    yield "mrope_position_ids", inputs.positions
    yield "rope_deltas", inputs.next_position[:, None] - inputs.ids.shape[1]
    yield "hidden_embeds", embed(model, known.rules, inputs, "auto")
    hidden = hidden_states(model, known.rules, inputs, mrope=True, lora=False)
    yield "last_hidden", _where_real(hidden, inputs, known.arrays["last_hidden"])
    yield "logits_last", model.language.logits(hidden[np.arange(len(samples)), inputs.lengths - 1])
    for k, sample in enumerate(samples):
        yield from _generated(known, model, tokenizer, sample, f"gen{k}_")


def _prepared(samples: Sequence[Sample], inputs: Inputs, rules: ImageRules, prefix: str = "") -> Iterator[Result]:
    """What goes into the network, in the processor's names and layout."""
    yield f"{prefix}input_ids", inputs.ids
    if not prefix:
        yield "attention_mask", _real(inputs).astype(np.int64)
    yield f"{prefix}image_grid_thw", np.asarray([grid for sample in samples for grid in sample.grids])
    yield f"{prefix}pixel_values", _packed(samples, normalised(jnp.asarray(inputs.patches), rules))


def _tower(model: Qwen25VL, samples: Sequence[Sample], inputs: Inputs, rules: ImageRules) -> Iterator[Result]:
    config, layout = model.config.vision, inputs.layout
    assert layout is not None
    patches = normalised(jnp.asarray(inputs.patches), rules)
    yield "vis_patch_embed", _packed(samples, model.vision.patch_in(patches))
    yield "vis_rot_pos_emb", _packed(samples, rope_angles(jnp.asarray(layout.positions), config))
    yield "vis_out", _packed(samples, model.vision(patches, layout), config.unit)
    orders, lengths, before = [], [], 0
    for grid in (grid for sample in samples for grid in sample.grids):
        order, of_windows = window_order(grid, config)
        orders.append(order + before)
        lengths.append(of_windows)
        before += len(order)
    yield "vis_window_index", np.concatenate(orders)
    yield "vis_cu_window_seqlens", np.cumsum(np.concatenate([[0], *lengths]))


def _generated(
    known: Recorded, model: Qwen25VL, tokenizer: QwenTokenizer, sample: Sample, prefix: str
) -> Iterator[Result]:
    """One sample alone, its end suppressed for as many tokens as were recorded."""
    inputs = known.inputs([sample], model, tokenizer)
    yield from _prepared([sample], inputs, known.rules, prefix)
    count = known.arrays[f"{prefix}new_tokens"].shape[1]
    ends = end_tokens(known.folder / "base", model.config) or (tokenizer.eos or tokenizer.pad,)
    decoding = Decoding(count, ends, tokenizer.pad, min_new_tokens=count, keep_logits=True)
    made = texts(*_split(model, known.rules, decoding), inputs)
    yield f"{prefix}new_tokens", made.tokens
    yield f"{prefix}logits", made.logits


def reward(recording: Recording) -> Iterator[Result]:
    """The reward model: rewards of the batch and of each sample alone, with the LoRA merged and kept apart."""
    known, arrays = Recorded(recording), recording.arrays(REWARD)
    checkpoint = known.checkpoint
    added = [SPECIAL_TOKEN] if checkpoint.config.special_tokens else []
    tokenizer = QwenTokenizer(checkpoint.tokenizer, template_from=checkpoint.base, added=added)
    model, apart = (checkpoint.load(dtype=jnp.float32, merge=merge) for merge in (True, False))
    samples = known.samples(tokenizer, "reward")
    inputs = known.inputs(samples, model, tokenizer)
    yield from _prepared(samples, inputs, known.rules)
    yield "mrope_position_ids", inputs.positions
    for name, mrope in (("last_hidden", False), ("last_hidden_mrope", True)):
        hidden = hidden_states(model, known.rules, inputs, mrope=mrope, lora=False)
        yield name, _where_real(hidden, inputs, arrays[name])
    special = tokenizer.id_of(SPECIAL_TOKEN)
    for match, _ in recording.numbered(REWARD, _REWARD.pattern):
        alone, token, kind = match["alone"], match["token"], match["how"]
        how = Scoring(token, special, mrope=kind == "_mrope", lora=kind != "_nolora")
        given = inputs if alone is None else known.inputs([samples[int(alone)]], model, tokenizer)
        ours = [rewards(*_split(one, known.rules, how), given) for one in _models(kind, model, apart)]
        yield match[0], _agreeing(ours, recording.meta["tolerance"])


def _models(kind: str | None, model: Qwen25VL, apart: Qwen25VL) -> list[Qwen25VL]:
    return [apart] if kind == "_nolora" else [model, apart]


def _agreeing(ours: Sequence[jax.Array], tolerances: Any) -> np.ndarray:
    """The LoRA merged and the LoRA kept apart must say the same; the first of them is compared."""
    first, *others = (np.asarray(one) for one in ours)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=float(tolerances["qwen, nvila"]), atol=1e-6)
    return first


def _split(model: Qwen25VL, rules: ImageRules, how: Any) -> tuple[Any, ImageRules, Any, Any]:
    graph, state = nnx.split(model)
    return graph, rules, how, state


def _packed(samples: Sequence[Sample], padded: Any, unit: int = 1) -> np.ndarray:
    """Rows of all pictures one after another, without their padding."""
    counts = [len(patches) // unit for sample in samples for patches, _ in sample.pictures]
    return np.concatenate([one[:count] for one, count in zip(np.asarray(padded), counts, strict=True)])


def _real(inputs: Inputs) -> np.ndarray:
    return np.arange(inputs.ids.shape[1]) < np.asarray(inputs.lengths)[:, None]


def _where_real(ours: Any, inputs: Inputs, recorded: np.ndarray) -> np.ndarray:
    """What padding gives means nothing, and is compared with itself."""
    return np.where(_real(inputs)[..., None], np.asarray(ours), recorded)


def _encoded_again(tokenizer: QwenTokenizer, recorded: np.ndarray) -> np.ndarray:
    """The recorded texts, which only their tokens tell, encoded by us."""
    out = np.full_like(recorded, tokenizer.pad)
    for row, ids in zip(out, recorded, strict=True):
        own = tokenizer.encode(tokenizer.decode(ids))
        row[: len(own)] = own
    return out
