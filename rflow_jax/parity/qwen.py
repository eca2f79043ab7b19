"""Recordings of Qwen2.5-VL and of the reward model on it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from rflow_jax.models.qwen2.generation import Decoding
from rflow_jax.models.qwen2_5_vl.layout import window_order
from rflow_jax.models.qwen2_5_vl.model import Qwen25VL, rope_angles
from rflow_jax.parity.measure import Recording, relative_error
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.utils.json_files import read_json
from rflow_jax.vlm.qwen_batching import QwenInputs, QwenSample, Sizes, batch_of
from rflow_jax.vlm.qwen_processing import (
    ImageProcessorConfig,
    fitted,
    limited,
    normalised,
    patches_of,
    read_image_processor_config,
)
from rflow_jax.vlm.qwen_programs import embed, hidden_states, texts
from rflow_jax.weights.qwen import end_tokens, load_qwen, read_qwen_config
from rflow_jax.weights.reward import RewardCheckpoint
from rflow_jax.weights.reward_config import SPECIAL_TOKEN

BASE, REWARD = "qwen/golden_base", "qwen/golden_reward"
_REWARD = re.compile(r"reward_(?:single(?P<alone>\d+)_)?(?P<token>special|last|mean)(?P<variant>_mrope|_nolora)?")
Result = tuple[str, Any]


@dataclass(frozen=True)
class Recorded:
    """The recorded pictures and texts, prepared by this package."""

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
    def rules(self) -> ImageProcessorConfig:
        base = self.folder / "base"
        return read_image_processor_config(base, read_qwen_config(base))

    @cached_property
    def resized(self) -> list[Image.Image]:
        """The pictures, within the checkpoint's pixel limit."""
        found = sorted((int(m[1]), pixels) for m, pixels in self.recording.numbered(BASE, r"in_image(\d+)_uint8"))
        limit = self.checkpoint.config.max_pixels
        return [limited(Image.fromarray(pixels), limit, self.rules.factor) for _, pixels in found]

    def samples(self, tokenizer: QwenTokenizer, kind: str) -> list[QwenSample]:
        """One sample per picture."""
        chats = read_json(self.folder / "texts.json")[f"{kind}_chat_texts"]
        pictures = [patches_of(fitted(image, self.rules), self.rules) for image in self.resized]
        return [QwenSample(tokenizer.encode(text), (one,)) for text, one in zip(chats, pictures, strict=True)]


def _batch(samples: Sequence[QwenSample], model: Qwen25VL, tokenizer: QwenTokenizer) -> QwenInputs:
    """A batch padded to its longest sample, as the recording's was."""
    return batch_of(samples, model.config, pad=tokenizer.pad, sizes=Sizes.exact(samples, model.config))


def base(recording: Recording) -> Iterator[Result]:
    """The model itself: preparation, tower, positions, hidden states, logits, greedy tokens."""
    known = Recorded(recording)
    tokenizer = QwenTokenizer(known.folder / "base")
    model = load_qwen(known.folder / "base", dtype=jnp.float32)
    for k, image in enumerate(known.resized):
        yield f"resized{k}_uint8", np.asarray(image)
    # Only the tokens of these texts were recorded: decoded, and encoded again.
    recorded = known.arrays["input_ids_text"]
    encoded = np.full_like(recorded, tokenizer.pad)
    for row, ids in zip(encoded, recorded, strict=True):
        own = tokenizer.encode(tokenizer.decode(ids))
        row[: len(own)] = own
    yield "input_ids_text", encoded
    samples = known.samples(tokenizer, "base")
    inputs = _batch(samples, model, tokenizer)
    yield from _prepared(samples, inputs, known.rules)
    yield from _tower(model, samples, inputs, known.rules)
    yield "mrope_position_ids", inputs.positions
    yield "rope_deltas", inputs.next_position[:, None] - inputs.ids.shape[1]
    graph, state = nnx.split(model)
    embedded, hidden = _hidden(graph, known.rules, False, state, inputs, jnp.asarray(True))
    yield "hidden_embeds", embedded
    yield "last_hidden", _where_real(hidden, inputs, known.arrays["last_hidden"])
    yield "logits_last", model.language.logits(hidden[np.arange(len(samples)), inputs.lengths - 1])
    for k, sample in enumerate(samples):
        yield from _prepared([sample], _batch([sample], model, tokenizer), known.rules, f"gen{k}_")
    yield from _generated(known, model, tokenizer, inputs)


def _prepared(
    samples: Sequence[QwenSample], inputs: QwenInputs, rules: ImageProcessorConfig, prefix: str = ""
) -> Iterator[Result]:
    """The network's inputs, in the processor's names and layout."""
    yield f"{prefix}input_ids", inputs.ids
    if not prefix:
        yield "attention_mask", _attention_mask(inputs).astype(np.int64)
    yield f"{prefix}image_grid_thw", np.asarray([grid for sample in samples for grid in sample.grids])
    yield f"{prefix}pixel_values", _packed(samples, normalised(jnp.asarray(inputs.patches), rules))


def _tower(
    model: Qwen25VL, samples: Sequence[QwenSample], inputs: QwenInputs, rules: ImageProcessorConfig
) -> Iterator[Result]:
    config, layout = model.config.vision, inputs.layout
    assert layout is not None
    patches = normalised(jnp.asarray(inputs.patches), rules)
    yield "vis_patch_embed", _packed(samples, model.vision.patch_in(patches))
    yield "vis_rot_pos_emb", _packed(samples, rope_angles(jnp.asarray(layout.positions), config))
    yield "vis_out", _packed(samples, jax.jit(model.vision)(patches, layout), config.unit)
    orders, lengths, before = [], [], 0
    for grid in (grid for sample in samples for grid in sample.grids):
        order, of_windows = window_order(grid, config)
        orders.append(order + before)
        lengths.append(of_windows)
        before += len(order)
    yield "vis_window_index", np.concatenate(orders)
    yield "vis_cu_window_seqlens", np.cumsum(np.concatenate([[0], *lengths]))


def _generated(known: Recorded, model: Qwen25VL, tokenizer: QwenTokenizer, inputs: QwenInputs) -> Iterator[Result]:
    """The recorded generations of single samples, made as a batch; end tokens are suppressed throughout."""
    counts = {
        m[0]: recorded.shape[1] for m, recorded in known.recording.numbered(BASE, r"gen(\d+)_(new_tokens|logits)")
    }
    ends = end_tokens(known.folder / "base", model.config) or (tokenizer.eos or tokenizer.pad,)
    most = max(counts.values())
    decoding = Decoding(most, ends, tokenizer.pad, min_new_tokens=most, keep_logits=True)
    graph, state = nnx.split(model)
    made = texts(graph, known.rules, decoding, state, inputs)
    for name, count in counts.items():
        row = int(name.removeprefix("gen").split("_")[0])
        ours = made.tokens if name.endswith("new_tokens") else made.logits
        yield name, np.asarray(ours)[row : row + 1, :count]


def reward(recording: Recording) -> Iterator[Result]:
    """The reward model: hidden states and rewards of the batch and of each sample alone."""
    known = Recorded(recording)
    network = _Network(known)
    samples = known.samples(network.tokenizer, "reward")
    sizes = Sizes.exact(samples, network.merged.config)
    whole = network.batch(samples, sizes)
    yield from _prepared(samples, whole, known.rules)
    yield "mrope_position_ids", whole.positions
    for match, recorded in recording.numbered(REWARD, r"last_hidden(_mrope)?"):
        yield match[0], _where_real(network.hidden(whole, match[1]), whole, recorded)
    for match, recorded in recording.numbered(REWARD, _REWARD.pattern):
        alone = match["alone"]
        inputs = whole if alone is None else network.batch([samples[int(alone)]], sizes)
        ours = network.rewards(inputs, match["token"], match["variant"])[: 1 if alone else None]
        if match[0] == "reward_special":  # also with an unmerged LoRA; the larger error counts
            ours = max(ours, network.unmerged(whole), key=lambda one: relative_error(np.asarray(one), recorded))
        yield match[0], ours


class _Network:
    """The reward model with its LoRA merged, and with it unmerged."""

    def __init__(self, known: Recorded):
        checkpoint = known.checkpoint
        added = [SPECIAL_TOKEN] if checkpoint.config.special_tokens else []
        self.tokenizer = QwenTokenizer(checkpoint.tokenizer, template_from=checkpoint.base, added=added)
        self.merged = checkpoint.load(dtype=jnp.float32)
        self._unmerged = checkpoint.load(dtype=jnp.float32, merge=False)
        self._rules = known.rules

    def batch(self, samples: Sequence[QwenSample], sizes: Sizes) -> QwenInputs:
        return batch_of(samples, self.merged.config, pad=self.tokenizer.pad, sizes=sizes)

    def hidden(self, inputs: QwenInputs, variant: str | None) -> jax.Array:
        """``variant``: ``_mrope``, ``_nolora``, or None, the original's."""
        model = self._unmerged if variant == "_nolora" else self.merged
        graph, state = nnx.split(model)
        return _hidden(graph, self._rules, variant != "_nolora", state, inputs, jnp.asarray(variant == "_mrope"))[1]

    def rewards(self, inputs: QwenInputs, token: str, variant: str | None) -> jax.Array:
        return self._read(self.hidden(inputs, variant), inputs, token)

    def unmerged(self, inputs: QwenInputs) -> jax.Array:
        """The rewards of the special token with the unmerged LoRA."""
        graph, state = nnx.split(self._unmerged)
        _, hidden = _hidden(graph, self._rules, True, state, inputs, jnp.asarray(False))
        return self._read(hidden, inputs, "special")

    def _read(self, hidden: jax.Array, inputs: QwenInputs, token: Any) -> jax.Array:
        special = self.tokenizer.id_of(SPECIAL_TOKEN)
        ids, lengths = jnp.asarray(inputs.ids), jnp.asarray(inputs.lengths)
        return self.merged.rewards(hidden, ids, lengths, token=token, special=special)


# Compiled whole: op by op it would take many times as long.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _hidden(
    graph: nnx.GraphDef, rules: ImageProcessorConfig, lora: bool, state: nnx.State, inputs: QwenInputs, mrope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Embeddings, and hidden states after the last norm."""
    model = nnx.merge(graph, state)
    x = embed(model, rules, inputs, lora=lora)
    return x, hidden_states(model, x, inputs, mrope, lora=lora)


def _packed(samples: Sequence[QwenSample], padded: Any, unit: int = 1) -> np.ndarray:
    """Rows of all pictures one after another, without padding."""
    counts = [len(patches) // unit for sample in samples for patches, _ in sample.pictures]
    return np.concatenate([one[:count] for one, count in zip(np.asarray(padded), counts, strict=True)])


def _attention_mask(inputs: QwenInputs) -> np.ndarray:
    return np.arange(inputs.ids.shape[1]) < np.asarray(inputs.lengths)[:, None]


def _where_real(ours: Any, inputs: QwenInputs, recorded: np.ndarray) -> np.ndarray:
    """Replaces the meaningless results of padding by the recording's."""
    return np.where(_attention_mask(inputs)[..., None], np.asarray(ours), recorded)
