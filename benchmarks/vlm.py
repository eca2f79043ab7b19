"""Rewards and texts a second of Qwen2.5-VL, beside Transformers' PyTorch on the same accelerator in the same run.

    python -m rflow_jax.testing.make_qwen FOLDER
    python -m benchmarks.vlm FOLDER [--batch 8 32] [--pictures 32] [--side 512] [--quantization int8 fp8] [--alone]

FOLDER holds random weights of the true shapes; both sides read the same files, in bfloat16. Every row is the median
of a few calls after a first one. "from pictures" begins with pictures in memory, as a search has them, and ends with
numbers on the host; "on the device" begins with arrays that lie on the accelerator. Of the accelerator's memory "held"
is what the side has at the end of the row (weights and inputs), "peak" the most it had until then. The last lines say
how near the two sides' numbers are. ``--quantization`` adds rows with weights in 8 bits, ``--alone`` leaves
Transformers out.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

# Both frameworks live in one process, one after the other: neither may take all the memory at its start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from transformers.utils.import_utils import is_torchvision_available

from rflow_jax.models.quantization import Quantization, quantize
from rflow_jax.models.qwen2.generation import Decoding
from rflow_jax.models.qwen2_5_vl.model import LANGUAGE_LINEARS
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.verifiers.config import RewardVerifierConfig
from rflow_jax.verifiers.reward import RewardVerifier
from rflow_jax.vlm.qwen_batching import QwenInputs, QwenSample, Sizes, batch_of
from rflow_jax.vlm.qwen_processing import QwenProcessor, read_image_processor_config
from rflow_jax.vlm.qwen_programs import Scoring, rewards, texts
from rflow_jax.weights.qwen import end_tokens, load_qwen, read_qwen_config
from rflow_jax.weights.reward import RewardCheckpoint

QUESTION = "Does the picture show what the prompt says? Name what is missing, what is too much and what is misplaced."
REWARDS, TOKENS = "rewards/s", "tokens/s"
OURS = "rflow_jax"
FROM_PICTURES, ON_DEVICE = "from pictures", "on the device"


@dataclass(frozen=True)
class Row:
    """A measurement: what is counted a second, by whom, how."""

    unit: str
    system: str
    batch: int
    how: str
    rate: float
    spread: float
    first: float


class Table:
    """Rows, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        print(
            "unit       system           batch  how               rate   spread  first call s  held, peak GiB",
            flush=True,
        )

    def measure(self, unit: str, system: str, batch: int, how: str, count: int, call: Callable[[], Any], n: int) -> Any:
        """Times ``call``, which makes ``count`` of the unit; returns what it gave."""
        begin = time.perf_counter()
        result = call()
        first = time.perf_counter() - begin
        seconds = []
        for _ in range(n):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        rate = count / statistics.median(seconds)
        row = Row(unit, system, batch, how, rate, (max(seconds) - min(seconds)) / statistics.median(seconds), first)
        self.rows.append(row)
        print(
            f"{unit:10s} {system:15s} {batch:6d}  {how:14s} {rate:8.1f} {row.spread:8.1%} {first:13.1f} "
            f"{_memory(system)}",
            flush=True,
        )
        return result

    def best(self, unit: str, system: str, how: str) -> Row | None:
        """The fastest row, whatever its batch."""
        own = [row for row in self.rows if (row.unit, row.system, row.how) == (unit, system, how)]
        return max(own, key=lambda row: row.rate, default=None)

    def ratios(self) -> Iterator[str]:
        """Ours over theirs, each at its best batch."""
        for unit, how in dict.fromkeys((row.unit, row.how) for row in self.rows):
            ours, theirs = self.best(unit, OURS, how), self.best(unit, "transformers", how)
            if ours and theirs:
                yield f"{unit} {how}: {ours.rate / theirs.rate:.2f} times (batches {ours.batch} and {theirs.batch})"


@dataclass(frozen=True)
class Work:
    """What both sides are asked; the tokens of each question and its pictures' patches are made once, by ours."""

    folder: Path
    pictures: Sequence[Image.Image]
    prompts: Sequence[str]
    batches: Sequence[int]
    new_tokens: int
    repeats: int
    prepare: QwenProcessor
    scored: Sequence[QwenSample]
    asked: Sequence[QwenSample]

    @property
    def items(self) -> list[dict[str, str]]:
        return [{"prompt": prompt} for prompt in self.prompts]


def make_work(arguments: argparse.Namespace) -> Work:
    """Pictures of coloured patches, and prompts of different lengths."""
    draw, side, base = np.random.default_rng(0), arguments.side, arguments.folder / "base"
    colours = draw.integers(0, 256, (arguments.pictures, 8, 8, 3), np.uint8)
    pictures = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in colours]
    sentence = "a photo of two red apples left of a wooden bench under an old street lamp"
    prompts = [sentence[: len(sentence) // 2 + k % (len(sentence) // 2)] for k in range(len(pictures))]
    sizes = read_qwen_config(base)
    context = sizes.language.max_position_embeddings
    prepare = QwenProcessor(QwenTokenizer(base), read_image_processor_config(base, sizes), sizes, context, side**2)
    pairs = list(zip(pictures, prompts, strict=True))
    scored = [prepare.sample(pair) for pair in pairs]
    asked = [prepare.sample((picture, f"{QUESTION} {prompt}")) for picture, prompt in pairs]
    how = arguments.batch, arguments.tokens, arguments.repeats
    return Work(arguments.folder, pictures, prompts, *how, prepare, scored, asked)


class Ours:
    """This package's programs."""

    def __init__(self, work: Work, table: Table, quantization: Quantization | None = None):
        self.work, self.table = work, table
        self.quantization: Quantization | None = quantization
        self.name = f"{OURS}, {quantization}" if quantization else OURS

    def rewards(self) -> np.ndarray:
        """Measures, and returns the rewards."""
        work, size = self.work, max(self.work.batches)
        how = {"batch_size": size, "max_pixels": work.prepare.max_pixels, "quantization": self.quantization}
        verifier = RewardVerifier(RewardVerifierConfig(str(work.folder / "reward"), **how))

        def from_pictures() -> list[Any]:
            return verifier.score(work.pictures, work.items)

        count = len(work.pictures)
        verdicts = self.table.measure(REWARDS, self.name, size, FROM_PICTURES, count, from_pictures, work.repeats)
        if errors := {verdict.error for verdict in verdicts if verdict.error}:
            raise RuntimeError(f"no scores: {errors}")
        del verifier
        model = RewardCheckpoint.open(work.folder / "reward").load(dtype=jnp.bfloat16)
        graph, state = nnx.split(quantize(model, self.quantization, LANGUAGE_LINEARS))
        for batch in work.batches:
            inputs = [self._placed(part) for part in parts_of(work.scored, batch)]

            def on_device(inputs: Sequence[QwenInputs] = inputs) -> list[jax.Array]:
                rules, how = work.prepare.rules, Scoring("last")
                return jax.block_until_ready([rewards(graph, rules, how, state, one) for one in inputs])

            self.table.measure(REWARDS, self.name, batch, ON_DEVICE, count, on_device, work.repeats)
        return np.array([verdict.score for verdict in verdicts])

    def texts(self) -> np.ndarray:
        """Measures, and returns the tokens."""
        work, n = self.work, self.work.new_tokens
        base = work.folder / "base"
        model = quantize(load_qwen(base, dtype=jnp.bfloat16), self.quantization, LANGUAGE_LINEARS)
        graph, state = nnx.split(model)
        del model  # what was quantized is held once
        ends = end_tokens(base, work.prepare.config)
        decoding = Decoding(n, ends, work.prepare.tokenizer.pad, min_new_tokens=n)
        made: list[np.ndarray] = []
        for batch in work.batches:
            inputs = [self._placed(part) for part in parts_of(work.asked, batch)]

            def on_device(inputs: Sequence[QwenInputs] = inputs) -> list[np.ndarray]:
                given = graph, work.prepare.rules, decoding, state
                return [np.asarray(texts(*given, one).tokens) for one in inputs]

            count = n * len(work.asked)
            made = self.table.measure(TOKENS, self.name, batch, ON_DEVICE, count, on_device, work.repeats)
        return np.concatenate(made)

    def _placed(self, samples: Sequence[QwenSample]) -> QwenInputs:
        prepare = self.work.prepare
        sizes = Sizes.bucketed(samples, prepare.config, len(samples))
        return jax.device_put(batch_of(samples, prepare.config, pad=prepare.tokenizer.pad, sizes=sizes))


class Theirs:
    """Transformers' modules with PyTorch's scaled dot-product attention, given the same tokens."""

    name = "transformers"

    def __init__(self, work: Work, table: Table):
        self.work, self.table = work, table
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        base, kind = work.folder / "base", transformers.Qwen2_5_VLForConditionalGeneration
        model: Any = kind.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model = model.to(self.device).eval()
        # The fast one of version 4; in version 5 it has the plain name.
        name = "Qwen2VLImageProcessor"
        fast = f"{name}Fast" if is_torchvision_available() else name
        self.processor: Any = getattr(transformers, fast, getattr(transformers, name)).from_pretrained(base)
        (head,) = (work.folder / "reward").glob("checkpoint-*/non_lora_state_dict.safetensors")
        self.head = torch.tensor(load_file(head)["rm_head.weight"], device=self.device, dtype=torch.bfloat16)

    def rewards(self) -> np.ndarray:
        """Measures, and returns the rewards."""
        work, count, scores = self.work, len(self.work.pictures), np.zeros(0)
        for batch in work.batches:
            parts = list(zip(parts_of(work.scored, batch), parts_of(work.pictures, batch), strict=True))

            def from_pictures(parts: Sequence[Any] = parts) -> np.ndarray:
                return np.concatenate([self._score(self._inputs(*part)) for part in parts])

            scores = self.table.measure(REWARDS, self.name, batch, FROM_PICTURES, count, from_pictures, work.repeats)
            inputs = [self._inputs(*part) for part in parts]

            def on_device(inputs: Sequence[Any] = inputs) -> np.ndarray:
                return np.concatenate([self._score(one) for one in inputs])

            self.table.measure(REWARDS, self.name, batch, ON_DEVICE, count, on_device, work.repeats)
        return scores

    def texts(self) -> np.ndarray:
        """Measures, and returns the tokens."""
        work, n = self.work, self.work.new_tokens
        made: list[np.ndarray] = []
        for batch in work.batches:
            parts = zip(parts_of(work.asked, batch), parts_of(work.pictures, batch), strict=True)
            inputs = [self._inputs(*part) for part in parts]

            def on_device(inputs: Sequence[Any] = inputs) -> list[np.ndarray]:
                return [self._generate(one) for one in inputs]

            count = n * len(work.asked)
            made = self.table.measure(TOKENS, self.name, batch, ON_DEVICE, count, on_device, work.repeats)
        return np.concatenate(made)

    def _inputs(self, samples: Sequence[QwenSample], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        """Tokens padded on the left, and the pictures by Transformers' own processor."""
        longest = max(len(sample.ids) for sample in samples)
        ids = torch.full((len(samples), longest), self.work.prepare.tokenizer.pad)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(samples):
            ids[row, longest - len(sample.ids) :] = torch.from_numpy(sample.ids.astype(np.int64))
            mask[row, longest - len(sample.ids) :] = 1
        seen = self.processor(images=list(pictures), return_tensors="pt")
        given = {"input_ids": ids, "attention_mask": mask, **seen}
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # Transformers 5
            given["mm_token_type_ids"] = (ids == self.work.prepare.config.image_token_id).int()
        return {name: value.to(self.device) for name, value in given.items()}

    @torch.inference_mode()
    def _score(self, inputs: dict[str, Any]) -> np.ndarray:
        # Positions as the original's reward model counts them: tokens, on all three axes alike.
        plain = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        hidden = self.model.model(**inputs, position_ids=plain.expand(3, -1, -1), use_cache=False).last_hidden_state
        return (hidden[:, -1] @ self.head.T)[:, 0].float().cpu().numpy()

    @torch.inference_mode()
    def _generate(self, inputs: dict[str, Any]) -> np.ndarray:
        n = self.work.new_tokens
        made = self.model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False)
        return made[:, inputs["input_ids"].shape[1] :].cpu().numpy()


def _memory(system: str) -> str:
    if system == Theirs.name:
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    else:
        stats = jax.devices()[0].memory_stats() or {}
        held, peak = (stats.get(name, 0) for name in ("bytes_in_use", "peak_bytes_in_use"))
    return f"{held / 2**30:8.1f} {peak / 2**30:5.1f}"


def parts_of(things: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Of ``size`` each, the last may be shorter."""
    return [things[start : start + size] for start in range(0, len(things), size)]


def attempt(call: Callable[[], np.ndarray]) -> np.ndarray | None:
    """The result, or None where it fails: what the others measured must not be lost."""
    try:
        return call()
    except Exception:
        traceback.print_exc()
        return None


def compare(unit: str, ours: np.ndarray | None, theirs: np.ndarray | None) -> str:
    """How near the two sides' numbers are; both computed in bfloat16, in another order."""
    if ours is None or theirs is None:
        return f"{unit}: one side gave nothing to compare"
    if unit == REWARDS:
        apart = np.abs(ours - theirs).max() / theirs.std()
        return f"rewards: correlation {np.corrcoef(ours, theirs)[0, 1]:.4f}, farthest apart {apart:.3f} deviations"
    return (
        f"tokens: {(ours[:, 0] == theirs[:, 0]).mean():.0%} of the first and {(ours == theirs).mean():.0%} of all equal"
    )


def main() -> None:
    """Ours, then theirs; then the ratios and the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantization", choices=get_args(Quantization), nargs="+", default=[])
    parser.add_argument("--alone", action="store_true", help="without Transformers")
    arguments = parser.parse_args()
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{jax.devices()[0].device_kind}; {versions}", flush=True)
    work, table = make_work(arguments), Table()
    print(f"{len(work.scored[0].ids)} tokens to score, {len(work.asked[0].ids)} in a question", flush=True)
    results: dict[str, list[np.ndarray | None]] = {}
    for quantization in (None, *arguments.quantization):
        side: Ours | Theirs = Ours(work, table, quantization)
        results[side.name] = [attempt(side.rewards), attempt(side.texts)]
        del side
        gc.collect()
    if not arguments.alone:
        side = Theirs(work, table)
        results[side.name] = [attempt(side.rewards), attempt(side.texts)]
    for line in table.ratios():
        print(line)
    first, *others = results
    for other in others:
        for unit, one, two in zip((REWARDS, TOKENS), results[first], results[other], strict=True):
            print(f"{first} and {other}: {compare(unit, one, two)}")
    if any(result is None for both in results.values() for result in both):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
