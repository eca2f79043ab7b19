"""A Qwen2.5-VL that answers questions about pictures, in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from rflow_jax.errors import InputError
from rflow_jax.models.quantization import quantize
from rflow_jax.models.qwen2.generation import Decoding
from rflow_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from rflow_jax.models.qwen2_5_vl.model import LANGUAGE_LINEARS
from rflow_jax.parallel.sharding import on_devices, on_mesh_of
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.typing import Array
from rflow_jax.utils.batching import map_batched
from rflow_jax.utils.checks import require_dtype
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_batching import QwenInputs, QwenSample, Sizes, batch_of
from rflow_jax.vlm.qwen_processing import QwenProcessor, read_image_processor_config
from rflow_jax.vlm.qwen_programs import first_tokens, texts
from rflow_jax.weights.hub import resolve_lora, resolve_vlm
from rflow_jax.weights.lora.peft import attach_adapter, merged
from rflow_jax.weights.qwen import end_tokens, load_qwen, published_table, read_qwen_config, repetition_penalty

T = TypeVar("T")


@dataclass(frozen=True)
class ChatQuery:
    """Instructions, then texts and pictures in the order they are shown."""

    instructions: str | None
    parts: tuple[str | Image.Image, ...]


class QwenChat:
    """Answers questions in batches; one instance serves several roles.

    Raises:
        InputError: there is no such model, or it is not usable.
    """

    def __init__(self, config: QwenChatConfig):
        self.config = config
        folder = resolve_vlm(config.model)
        adapter = None if config.adapter is None else resolve_lora(config.adapter)
        sizes = read_qwen_config(folder)  # first, so that another network is reported early
        context = _context(sizes, config)
        ends, penalty = end_tokens(folder, sizes), repetition_penalty(folder)
        tokenizer = QwenTokenizer(folder)
        sharding_for = on_devices(config.devices)
        model = load_qwen(folder, dtype=getattr(jnp, require_dtype(config.dtype)), sharding_for=sharding_for)
        if adapter is not None:
            beside = adapter.parent if adapter.is_file() else adapter
            model = merged(attach_adapter(model, beside, published_table(model), sharding_for=sharding_for))
        quantize(model, config.quantization, LANGUAGE_LINEARS)
        self._decoding = decoding_of(
            config,
            eos=tuple(sorted({*ends, tokenizer.eos} - {None})),
            pad=tokenizer.pad,
            repetition_penalty=penalty,
            vocabulary=min(len(tokenizer), sizes.language.vocab_size),
        )
        self.prepare = QwenProcessor(
            tokenizer, read_image_processor_config(folder, sizes), sizes, context, config.max_pixels
        )
        self._graph, self._state = nnx.split(model)

    def answer(self, questions: Sequence[ChatQuery]) -> list[str | InputError]:
        """One answer per question, in order; an error in its place if a question is unusable."""
        return map_batched(questions, self._prepared, self._in_batches(self._texts), batch_size=self.config.batch_size)

    def first_tokens(self, questions: Sequence[ChatQuery], tokens: Sequence[int]) -> list[np.ndarray | InputError]:
        """Log-probabilities that each answer begins with each token, [tokens]; errors as in :meth:`answer`."""
        wanted = np.asarray(tokens, np.int32)

        def likely(inputs: QwenInputs, keys: Array) -> list[np.ndarray]:
            return list(np.asarray(first_tokens(self._graph, self.prepare.rules, self._state, inputs, wanted)))

        return map_batched(questions, self._prepared, self._in_batches(likely), batch_size=self.config.batch_size)

    def _prepared(self, question: ChatQuery) -> tuple[QwenSample, np.ndarray]:
        for text in (question.instructions, *question.parts):
            if isinstance(text, str):
                self.prepare.tokenizer.require_plain(text)
        sample = self.prepare.sample(question.parts, question.instructions)
        return sample, question_key(question, self.config.seed)

    def _in_batches(self, run: Callable[[QwenInputs, Array], Sequence[T]]) -> Callable[[Sequence[Any]], list[T]]:
        """A function of prepared questions: ``run`` of inputs and random keys, in padded batches of similar sizes."""
        rows = self.config.batch_size

        def over(prepared: Sequence[tuple[QwenSample, np.ndarray]]) -> list[T]:
            samples, keys = zip(*prepared, strict=True)
            found: dict[int, T] = {}
            for batch in batches(samples, rows):
                own = list(batch.values())
                sizes = Sizes.bucketed(own, self.prepare.config, rows)
                inputs = batch_of(own, self.prepare.config, pad=self.prepare.tokenizer.pad, sizes=sizes)
                data = np.zeros((rows, 2), np.uint32)
                data[: len(own)] = [keys[k] for k in batch]
                with on_mesh_of(self._state):
                    # The generator is named, so that JAX's default does not matter.
                    made = run(inputs, jax.random.wrap_key_data(jnp.asarray(data), impl="threefry2x32"))
                found |= dict(zip(batch, made, strict=False))
            return [found[k] for k in range(len(samples))]

        return over

    def _texts(self, inputs: QwenInputs, keys: Array) -> list[str]:
        generated = texts(self._graph, self.prepare.rules, self._decoding, self._state, inputs, keys)
        tokens, lengths = (np.asarray(x) for x in jax.device_get((generated.tokens, generated.lengths)))
        decode = self.prepare.tokenizer.decode
        return [decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]


def decoding_of(config: QwenChatConfig, repetition_penalty: float, **model: Any) -> Decoding:
    """The choice of tokens; ``repetition_penalty`` and the others are the model's own settings."""
    penalty = repetition_penalty if config.repetition_penalty is None else config.repetition_penalty
    sampled = {"temperature": config.temperature, "top_p": config.top_p, "repetition_penalty": penalty}
    return Decoding(config.max_new_tokens, **sampled, **model)


def _context(sizes: Qwen25VLConfig, config: QwenChatConfig) -> int:
    """Tokens that a question may have; its answer follows within the same context."""
    whole = sizes.language.max_position_embeddings
    if config.max_new_tokens >= whole:
        raise InputError(
            f"max_new_tokens is {config.max_new_tokens}; {config.model} reads {whole} tokens, question and answer "
            "together: give fewer"
        )
    return whole - config.max_new_tokens


def batches(samples: Sequence[QwenSample], size: int) -> Iterator[dict[int, QwenSample]]:
    """Batches of at most ``size`` samples by index; samples of similar sizes go together, which keeps padding low."""

    def patches_and_tokens(k: int) -> tuple[int, int]:
        return sum(len(patches) for patches, _ in samples[k].pictures), len(samples[k].ids)

    order = sorted(range(len(samples)), key=patches_and_tokens)
    for start in range(0, len(order), size):
        yield {k: samples[k] for k in order[start : start + size]}


def question_key(question: ChatQuery, seed: int) -> np.ndarray:
    """The bits of a random key that follows from a question and a seed: [2] uint32."""
    digest = hashlib.sha256(f"{seed}\n{question.instructions}".encode())
    for part in question.parts:
        digest.update(b"\0" + (part.encode() if isinstance(part, str) else part.convert("RGB").tobytes()))
    return np.frombuffer(digest.digest(), np.uint32, count=2)
