"""Recordings of NVILA: the tiling of images, its tower, its projector, and its answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from rflow_jax.models.nvila import Layout, Tiling, ask, chat, message
from rflow_jax.models.qwen2.model import rope_of
from rflow_jax.parity.measure import INPUT, Recording
from rflow_jax.utils.json_files import read_json
from rflow_jax.vlm.nvila_programs import NvilaPrograms, NvilaQuery
from rflow_jax.weights.nvila import NvilaModel, load_nvila

PREFIX = "nvila/"
TEMPLATES = {"chat": "raw", "plain": "raw", "sana": "question"}  # mode of a case -> the question's template
LIMITED_SIZE = 448  # of the tiles in the table of other limits, which has no column for it
Result = tuple[str, Any]
Check = Callable[[Recording], Iterator[Result]]


def checks(recording: Recording) -> dict[str, Check]:
    """The checks of the existing NVILA files, by file."""
    recorded = Recorded(recording)
    kinds: dict[str, Callable[[str], Iterator[Result]]] = {
        r"tiling": recorded.tiling,
        r"projector": recorded.projector,
        r"rope": recorded.rope,
        r"vision_\w+": recorded.vision,
        r"case_\w+": recorded.case,
    }
    files = [name for name in recording.names() if name.startswith(PREFIX)]
    found = {name: kinds[kind] for name in files for kind in kinds if re.fullmatch(PREFIX + kind, name)}
    return {name: lambda _, check=check, name=name: check(name) for name, check in found.items()}


@dataclass(frozen=True)
class TokenizedCase:
    """One tokenized case."""

    ids: list[int]
    layout: Layout
    row: int  # in the batch of all cases


class Recorded:
    """The recorded checkpoint, in float32, and the batch of all recorded cases."""

    def __init__(self, recording: Recording):
        self._recording = recording

    @cached_property
    def meta(self) -> Mapping[str, Any]:
        """The content of ``meta.json``."""
        return read_json(self._recording.root / PREFIX / "golden" / "meta.json")

    @cached_property
    def model(self) -> NvilaModel:
        return load_nvila(str(self._recording.root / PREFIX / "checkpoint"), dtype=jnp.float32, progress=False)

    def tiling(self, name: str) -> Iterator[Result]:
        """Grids of many sizes, and the tiles of some test pictures."""
        z, own = self._recording.arrays(name), self.model.config.tiling
        rows = []
        for width, height, size in z["grid_table"][:, :3].astype(int).tolist():
            across, down = replace(own, size=size).grid(width, height)
            rows.append([width, height, size, across, down, across * down + (across * down > 1)])
        yield "grid_table", np.asarray(rows)
        rows = [
            [width, height, least, most, *Tiling(LIMITED_SIZE, least, most).grid(width, height)]
            for width, height, least, most in z["grid_table_minmax"][:, :4].astype(int).tolist()
        ]
        yield "grid_table_minmax", np.asarray(rows)
        yield "level_to_pixel", self.model.levels[:, 0]
        for match, _ in self._recording.numbered(name, r"tile(\d+)_(\d+)x(\d+)_(\d+)"):
            size, width, height, picture = map(int, match.groups())
            image = pattern(width, height, self.meta["pattern_k"], self.meta["pattern"])
            yield match[0], replace(own, size=size).cut(Image.fromarray(image))[picture]
        for match, source in self._recording.numbered(name, r"(mode_\w+)_source"):
            yield match[0], INPUT
            yield f"{match[1]}_tile_last", own.cut(Image.fromarray(source))[-1]

    def projector(self, name: str) -> Iterator[Result]:
        """Random features of several grids, and what leaves each layer."""
        for match, features in self._recording.numbered(name, r"(\w+)_in"):
            stages = self.model.network.projector.stages(jnp.asarray(features))
            yield match[0], INPUT
            yield f"{match[1]}_down", stages[0]
            yield f"{match[1]}_out", stages[-1]
            for number, stage in enumerate(stages[1:], 1):
                yield f"{match[1]}_layer{number}", stage

    def rope(self, name: str) -> Iterator[Result]:
        """The rotary frequencies: the angles at position 1."""
        language = self.model.config.language
        cos, sin = rope_of(jnp.ones((1, 1), jnp.int32), language.head_dim, language.rope_theta)
        frequencies = np.arctan2(np.asarray(sin), np.asarray(cos))[0, 0]
        yield "inv_freq", frequencies
        yield "inv_freq_half", frequencies.astype(np.float16).astype(np.float32)

    def vision(self, name: str) -> Iterator[Result]:
        """An image on its way through the tower and the projector."""
        z, network = self._recording.arrays(name), self.model.network
        tiles = self.model.config.tiling.cut(Image.fromarray(z["image"]))
        pixels = self.model.levels[tiles, np.arange(tiles.shape[-1])]
        states = network.tower.states(jnp.asarray(pixels))
        yield "image", INPUT
        yield "tiles_u8", tiles
        for match, want in self._recording.numbered(name, r"pixel_values_\d+"):
            yield match[0], pixels[: len(want)].transpose(0, 3, 1, 2)
        yield "tower", network.tower.features(jnp.asarray(pixels), self.model.config.mm_vision_select_layer)
        for match, _ in self._recording.numbered(name, r"tower_hidden(\d+)_tile(\d+)"):
            yield match[0], states[int(match[1])][int(match[2])]
        for match, _ in self._recording.numbered(name, r"tower_last_hidden_tile(\d+)"):
            yield match[0], network.tower.final_norm(states[-1])[int(match[1])]
        yield "projected", network.look(jnp.asarray(tiles), jnp.asarray(self.model.levels))

    def case(self, name: str) -> Iterator[Result]:
        """One question, from its text to the greedy answer."""
        answer, tokenizer = self._asked[name], self.model.tokenizer
        if isinstance(answer, Exception):
            raise answer
        layout, row = answer.layout, answer.row
        yield "input_ids", np.asarray(answer.ids)
        yield "embed_kind", layout.kind
        yield "embed_tile", layout.picture
        yield "embed_source", layout.source
        yield "inputs_embeds", self._computed["embeddings"][row, : len(layout)]
        yield "attention_mask", np.ones(len(layout), bool)
        yield "final_hidden_last", self._computed["last_states"][row]
        logits = self._computed["logits"][row]
        yield "logits_last", logits
        yield "score_yes_no", logits[[tokenizer.yes, tokenizer.no]]
        made = int(self._computed["lengths"][row])
        for stage, values in (("greedy_tokens", "tokens"), ("greedy_logits", "greedy_logits")):
            steps = min(made, len(self._recording.arrays(name)[stage]))
            yield stage, self._computed[values][row, :steps]

    @cached_property
    def _asked(self) -> dict[str, TokenizedCase | Exception]:
        """Every case, numbered, or why it cannot be asked."""
        asked: dict[str, TokenizedCase | Exception] = {}
        row = 0
        for name in self._cases:
            try:
                ids, layout = self._text(self.meta["cases"][name.removeprefix(f"{PREFIX}case_")])
                asked[name] = TokenizedCase(ids, layout, row)
                row += 1
            except Exception as error:  # the other cases go on
                asked[name] = error
        return asked

    @cached_property
    def _computed(self) -> dict[str, np.ndarray]:
        """All cases in one batch of one length: compiled once."""
        questions = [
            NvilaQuery(self._pictures(self.meta["cases"][name.removeprefix(f"{PREFIX}case_")]), answer.layout)
            for name, answer in self._asked.items()
            if isinstance(answer, TokenizedCase)
        ]
        programs = NvilaPrograms(self.model, len(questions))
        longest = max(len(question.layout) for question in questions)
        batch = programs.batch(questions, list(range(len(questions))), longest)
        recorded = (self._recording.arrays(name) for name in self._cases)
        steps = max(len(arrays[stage]) for arrays in recorded for stage in ("greedy_tokens", "greedy_logits"))
        made = programs.greedy(batch, steps)
        assert made.logits is not None
        computed = {
            "embeddings": programs.embeddings(batch),
            "last_states": programs.last_states(batch),
            "logits": programs.answer(batch),
            "tokens": made.tokens,
            "lengths": made.lengths,
            "greedy_logits": made.logits[..., : self.model.tokenizer.size],
        }
        return {key: np.asarray(value) for key, value in computed.items()}

    @property
    def _cases(self) -> list[str]:
        return [name for name in self._recording.names() if name.startswith(f"{PREFIX}case_")]

    def _pictures(self, case: Mapping[str, Any]) -> np.ndarray:
        image = self._recording.arrays(f"{PREFIX}vision_{case['image']}")["image"]
        return self.model.config.tiling.cut(Image.fromarray(image))

    def _text(self, case: Mapping[str, Any]) -> tuple[list[int], Layout]:
        mode: Any = TEMPLATES[case["mode"]]
        asked = message([len(self._pictures(case)), ask(case["prompt"], mode)])
        text = asked if case["mode"] == "plain" else chat(asked)
        tokenizer = self.model.tokenizer
        return tokenizer.ids(text), tokenizer.layout(text, self.model.config.picture_tokens)


def pattern(width: int, height: int, k: int, numbers: Mapping[str, int]) -> np.ndarray:
    """The test image uint8 [height, width, 3] by the formula in ``verify_meta.json``."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    a, b, d, s, p1, p2, p3 = (numbers[key] for key in ("a", "b", "d", "s", "p1", "p2", "p3"))
    red = _wave(a * x + b * y + 17 * k, p1)
    green = _wave(x + d * y + 29 * k, p2)
    blue = (x // s + y // s + k) % 2 * 128 + _wave(x * y // 64 + 7 * k, p3) // 2
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def _wave(t: np.ndarray, p: int) -> np.ndarray:
    return np.abs(t % (2 * p) - p) * 255 // p
