"""Keeps keys out of what is shown and stored, also where a server repeats them."""

import re
from urllib.parse import unquote, urlsplit

from rflow_jax.chat.endpoint import NO_KEY

HIDDEN = "***"
_MASKED = re.compile(r"\*\*|\.\.\.|…")
_PART = 8  # so many characters of a key in a row are no accident
_MASKED_PART = 3
_SHORTEST = 8  # a shorter key keeps nobody out, and words of an answer may look like it


class Secrets:
    """The key and what is secret in an address.

    Args:
        key: of the API.
        address: of the API; its user, password and query count as secret.
    """

    def __init__(self, key: str, address: str | None) -> None:
        parts = urlsplit(address or "")
        inside = {parts.password or parts.username or "", *re.split("[&=]", parts.query)}
        held = {key, *inside, *map(unquote, inside)} - {"", NO_KEY}
        self._secrets = sorted(held, key=len, reverse=True)

    def blank(self, text: str) -> str:
        """An answer without the secrets themselves."""
        for secret in self._secrets:
            if len(secret) >= _SHORTEST:
                text = text.replace(secret, HIDDEN)
        return text

    def hide(self, text: str) -> str:
        """An error's text without the words that hold a secret or a part of one.

        Servers like to say which key they refuse, with stars in its middle.
        """
        return "".join(HIDDEN if self._betrays(word) else word for word in re.split(r"(\s+)", text))

    def _betrays(self, word: str) -> bool:
        window = _MASKED_PART if _MASKED.search(word) else _PART
        return any(part in word for secret in self._secrets for part in _parts(secret, window))


def _parts(secret: str, window: int) -> list[str]:
    window = min(window, len(secret))
    return [secret[start : start + window] for start in range(len(secret) - window + 1)]
