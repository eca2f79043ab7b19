"""A verifier that takes a prompt apart and asks a Qwen2.5-VL in this process about each part."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from rflow_jax.errors import InputError
from rflow_jax.utils.batching import CLOSED
from rflow_jax.verifiers.base import BATCHES_A_CALL, Verdict, unscored_number
from rflow_jax.verifiers.config import ChecklistVerifierConfig
from rflow_jax.verifiers.findings import Finding, Question, in_words
from rflow_jax.verifiers.yesno import means_yes_or_no
from rflow_jax.vlm.config import QwenChatConfig
from rflow_jax.vlm.qwen_chat import ChatQuery, QwenChat

Questions = Callable[[Mapping[str, Any]], list[Question]]
KNOWN = {"shapes": "rflow_jax.shapes.requirements:questions"}
log = logging.getLogger(__name__)


class ChecklistVerifier:
    """Scores images by the share of their questions that are answered with yes; every no is a finding.

    Raises:
        InputError: the model or the function that takes prompts apart is missing or not usable.
    """

    concurrency = 1
    batches_a_call = BATCHES_A_CALL

    def __init__(self, config: ChecklistVerifierConfig):
        self._questions = load_questions(config.questions)
        self._chat = QwenChat(
            QwenChatConfig(
                model=config.model,
                dtype=config.dtype,
                batch_size=config.batch_size,
                max_new_tokens=1,
                max_pixels=config.max_pixels,
                devices=config.devices,
                quantization=config.quantization,
                adapter=config.adapter,
            )
        )
        vocabulary = self._chat.prepare.tokenizer.vocabulary
        words = {number: word for token, number in vocabulary.items() if (word := means_yes_or_no(token))}
        self._tokens, self._is_yes = list(words), np.asarray([word == "yes" for word in words.values()], bool)
        if not 0 < self._is_yes.sum() < len(self._tokens):
            raise InputError(f"{config.model}: its tokenizer has no single tokens for yes and no")
        self.name = f"checklist {Path(config.model).name}"
        self.batch_size = config.batch_size
        self._closed = threading.Event()

    def score(self, images: Sequence[Image], items: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One verdict an image, in order; a prompt that cannot be taken apart is an error of that image alone."""
        asked: list[list[Question] | InputError] = []
        queries: list[ChatQuery] = []
        for image, item in zip(images, items, strict=True):
            try:
                questions = self._questions(item)
                queries += [ChatQuery(None, (image, question.text)) for question in questions]
                asked.append(questions)
            except InputError as error:
                log.warning("no score for an image of %r: %s", str(item.get("prompt"))[:60], error)
                asked.append(error)
        if self._closed.is_set():
            return [Verdict(None, error=CLOSED) for _ in images]
        answers = iter(self._chat.first_tokens(queries, self._tokens))
        return [
            Verdict(None, error=str(one))
            if isinstance(one, InputError)
            else self._verdict(one, [next(answers) for _ in one])
            for one in asked
        ]

    def close(self) -> None:
        """Images of calls that have not begun come back unscored, with the reason."""
        self._closed.set()

    def _verdict(self, questions: Sequence[Question], answers: Sequence[np.ndarray | InputError]) -> Verdict:
        findings = []
        for question, answer in zip(questions, answers, strict=True):
            if isinstance(answer, InputError):
                return Verdict(None, error=f"{question.text}: {answer}")
            likelihood = np.exp(answer.astype(np.float64))
            probability = float(likelihood[self._is_yes].sum() / likelihood.sum())
            if not math.isfinite(probability):
                return unscored_number("answer")
            findings.append(Finding(question, probability > 0.5, probability))
        met = sum(finding.met and all(findings[place].met for place in finding.question.needs) for finding in findings)
        raw = {finding.question.text: round(finding.probability, 4) for finding in findings}
        return Verdict(met / len(findings), explanation=in_words(findings), raw=raw)


def load_questions(name: str) -> Questions:
    """The function that takes a prompt apart: a known one, or ``package.module:function``.

    Raises:
        InputError: there is none of this name.
    """
    module, _, function = KNOWN.get(name, name).partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"questions is {name!r}: give {' or '.join(KNOWN)}, or package.module:function ({error})"
        ) from error
