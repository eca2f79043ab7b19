"""Foreign words in messages: one line of bounded length, and nothing that a terminal would obey."""

from __future__ import annotations

LONGEST = 1000  # characters of a message; its end often says what to do, so it is cut in the middle
_HEAD, _CUT = 650, " [...] "


def one_line(text: object, longest: int = LONGEST) -> str:
    """A text on one line, with control characters and what turns the direction of writing as escapes such as \\x1b."""
    whole = " ".join(str(text).split())
    if not whole.isprintable():
        whole = escaped(whole)
    if len(whole) > longest:
        head = longest * _HEAD // LONGEST
        whole = whole[:head] + _CUT + whole[len(whole) - (longest - head - len(_CUT)) :]
    return whole


def escaped(text: str) -> str:
    """A text with every letter that cannot be printed as its escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
