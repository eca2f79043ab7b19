"""NVILA-Lite-2B-Verifier in this process: asked whether an image shows its prompt, it says yes or no.

The score is the logit of that word as the first of its answer, taken greedily: what sampling leaves of the logits is
often minus infinity for one of the two.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL.Image import Image

from rflow_jax.models.nvila import ask, chat, message
from rflow_jax.parallel.sharding import on_devices
from rflow_jax.utils.batching import require_fitting
from rflow_jax.verifiers.base import BATCHES_A_CALL, Verdict, score_each, unscored_number
from rflow_jax.verifiers.config import NvilaVerifierConfig
from rflow_jax.vlm.nvila_programs import NvilaPrograms, NvilaQuery
from rflow_jax.weights.nvila import NvilaModel, load_nvila


class NvilaVerifier:
    """Scores images with NVILA.

    Args:
        model: an already loaded one, instead of the one the config names.

    Raises:
        InputError: no such model, or another network.
    """

    name = "nvila"
    concurrency = 1
    batches_a_call = BATCHES_A_CALL

    def __init__(self, config: NvilaVerifierConfig = NvilaVerifierConfig(), model: NvilaModel | None = None) -> None:
        self.config = config
        self.batch_size = config.batch_size
        self._closed = threading.Event()
        self.model = model or load_nvila(
            config.model,
            dtype=getattr(jnp, config.dtype),
            sharding_for=on_devices(config.devices),
            quantization=config.quantization,
        )
        self._programs = NvilaPrograms(self.model, config.batch_size)

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order.

        An image that cannot be decoded, a prompt that is too long or names special tokens, and a logit that is not
        a number are errors of that image alone.
        """
        return score_each(
            images, items, self._question, self._verdicts, batch_size=self.batch_size, closed=self._closed
        )

    def close(self) -> None:
        """Cancels what a running call has not begun; those images are unscored, with ``CLOSED`` as the reason."""
        self._closed.set()

    def _question(self, image: Image, prompt: str) -> NvilaQuery:
        config, tokenizer = self.model.config, self.model.tokenizer
        tokenizer.require_plain(prompt)
        columns, rows = config.tiling.grid(*image.size)
        pictures = columns * rows + (columns * rows > 1)
        text = chat(message([pictures, ask(prompt, self.config.template)]))
        layout = tokenizer.layout(text, config.picture_tokens)
        require_fitting(len(layout) + 1, tokenizer.context)  # said before the image is cut; its answer is a token
        return NvilaQuery(config.tiling.cut(image), layout)

    def _verdicts(self, questions: Sequence[NvilaQuery]) -> list[Verdict]:
        return [self._verdict(logits) for logits in self._programs.first_logits(questions)]

    def _verdict(self, logits: np.ndarray) -> Verdict:
        if not np.isfinite(logits).all():
            return unscored_number("logits")
        tokenizer = self.model.tokenizer
        yes, no = float(logits[tokenizer.yes]), float(logits[tokenizer.no])
        raw = {"yes": yes, "no": no, "answer": tokenizer.word(int(np.argmax(logits)))}
        if self.config.rank == "margin":
            return Verdict(score=yes - no, raw=raw)
        return Verdict(score=max(yes, no), label="yes" if yes > no else "no", raw=raw)
