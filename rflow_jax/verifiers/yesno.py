"""A verifier that decides by the likelihood of yes and no as the first word of the answer.

It serves models that were trained to decide, such as NVILA-Lite-2B-Verifier, and any other behind a server that
gives log-probabilities (vLLM, SGLang, OpenAI).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from PIL.Image import Image

from rflow_jax.openai_client import Answer, ChatRequest, UnusableAnswer
from rflow_jax.openai_client.messages import UnfitReply, image_part, words
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.config import YesNoVerifierConfig
from rflow_jax.verifiers.openai import ChatVerifier, yes_no_template

# Beside what a reader would strip: the marks for a space in tokens that a server gives as they stand in the vocabulary.
_AROUND = " \t\r\n\"'`*_.,:;!()[]\u0120\u010a\u2581"
_OPTIONS = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1, "temperature": 0}


class YesNoVerifier(ChatVerifier):
    """Scores images by the first token of the answer; one question an image.

    Raises:
        InputError: no key for OpenAI's own address, or the template is not usable.
    """

    def __init__(self, config: YesNoVerifierConfig, meter: UsageTracker | None = None) -> None:
        self._template = yes_no_template(config.template)
        super().__init__("yesno", config, meter)

    def question(self, image: Image, item: Mapping[str, Any]) -> ChatRequest:
        """The image and the prompt, without instructions: what such models were trained with."""
        parts = [image_part(image), words(self._template.safe_substitute(prompt=item["prompt"]))]
        expected = "yes or no as the first word, with its log-probability"
        return ChatRequest([{"role": "user", "content": parts}], _verdict, options=_OPTIONS, expected=expected)


def _verdict(answer: Answer) -> Verdict:
    if not answer.tokens:
        raise UnfitReply("the server gives no log-probabilities of the first token")
    label, score = decide(answer.tokens)
    explanation = (
        f"Asked whether the picture shows the prompt, a judge says {label} (probability {math.exp(score):.2f})."
    )
    return Verdict(score, label, explanation, raw=dict(answer.tokens))


def decide(tokens: Iterable[tuple[str, float]]) -> tuple[str, float]:
    """The likelier of yes and no, and its log-probability, summed over all ways to write it; a tie is a no.

    Args:
        tokens: first tokens with their log-probabilities; others than yes and no don't matter.

    Raises:
        UnusableAnswer: neither is among them.
    """
    ways: dict[str, list[float]] = {"no": [], "yes": []}
    for token, value in tokens:
        if word := means_yes_or_no(token):
            ways[word].append(value)
    sums = {word: _log_sum_exp(values) for word, values in ways.items() if values}
    if not sums:
        raise UnusableAnswer("neither yes nor no is among the likeliest first tokens")
    label = max(sums, key=lambda word: sums[word])
    return label, min(0.0, sums[label])  # rounding aside, no word is likelier than certain


def means_yes_or_no(token: str) -> str:
    """ "yes" or "no", if a token is one way to write it; else empty."""
    word = token.strip(_AROUND).lower()
    return word if word in ("yes", "no") else ""


def _log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))
