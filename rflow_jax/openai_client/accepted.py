"""What a server accepts in requests, learned from its refusals."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rflow_jax.openai_client.retry import refuses_form, said

if TYPE_CHECKING:
    import openai

FORMATS = ("json_schema", "json_object", "text")
"""Ways to ask for JSON, from strict to loose."""

_UNSUPPORTED = re.compile(
    r"unsupported|not supported|(?:not|n't) support|only the default|unrecognized|unknown|unexpected|deprecated|extra"
    r"|not (?:permitted|allowed|accepted)",
    re.IGNORECASE,
)
_FEWER = {20: 10, 10: 5, 5: 2}


@dataclass(frozen=True)
class Accepted:
    """How requests are written for one server.

    Attributes:
        format: place in ``FORMATS``.
        temperature: whether it takes one.
        completion_tokens: whether the limit of tokens is named ``max_completion_tokens``.
        top_logprobs: so many likeliest tokens, at most.
    """

    format: int = 0
    temperature: bool = True
    completion_tokens: bool = False
    top_logprobs: int = 20

    def written(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request as the server takes them."""
        found = dict(fields)
        if not self.temperature:
            found.pop("temperature", None)
        if self.completion_tokens and "max_tokens" in found:
            found["max_completion_tokens"] = found.pop("max_tokens")
        if "top_logprobs" in found:
            found["top_logprobs"] = min(found["top_logprobs"], self.top_logprobs)
        return found

    def with_all(self, other: "Accepted") -> "Accepted":
        """The narrower of two in each respect; questions in flight learn different things."""
        return Accepted(
            max(self.format, other.format),
            self.temperature and other.temperature,
            self.completion_tokens or other.completion_tokens,
            min(self.top_logprobs, other.top_logprobs),
        )

    def after(self, error: "openai.APIStatusError", sent: Mapping[str, Any], auto: bool) -> "Accepted | None":
        """What to try after a refusal of ``sent``; None if there is nothing else to try.

        Args:
            auto: whether a looser format may be tried.
        """
        words = said(error)
        if error.status_code not in (400, 422):
            return None
        if "temperature" in sent and "temperature" in words and _UNSUPPORTED.search(words):
            return replace(self, temperature=False)
        unsupported = "max_completion_tokens" in words or ("max_tokens" in words and _UNSUPPORTED.search(words))
        if "max_tokens" in sent and unsupported:
            return replace(self, completion_tokens=True)
        if "logprobs" in words and sent.get("top_logprobs") in _FEWER:
            return replace(self, top_logprobs=_FEWER[sent["top_logprobs"]])
        if "response_format" in sent and auto and self.format < len(FORMATS) - 1 and refuses_form(error):
            return replace(self, format=self.format + 1)
        return None
