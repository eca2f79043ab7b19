"""The messages of jsonargparse in the words of the command line."""

import re
from argparse import ArgumentError
from collections.abc import Collection

from rflow_jax.utils.checks import RENAMED, current_key, nearest

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "keys with values",
    "NoneType": "null",
}
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|[Oo]ption |[Kk]ey )['\"]?([A-Za-z_][\w.-]*)")
_NO_SECTION = re.compile(r"""Parser key "([\w.]+)": Unable to load config ('.*?'|".*?") - (.*)""")


def explain(error: ArgumentError, files: str, known: Collection[str]) -> str:
    """jsonargparse's message in the words of the command line, with the nearest of the known keys for an unknown one.

    Args:
        files: where the values stand: YAML files, or the command line.
    """
    text = plain(error)
    unknown = _UNKNOWN.search(text)
    if unknown is None or "Parser key" in text or text.startswith("Problems parsing"):
        if text.startswith("Unexpected config"):  # repeats the whole file
            return f"{files}: expected keys with values"
        return text.replace('"<unicode string>"', files)
    # The value behind an unknown key is not repeated: it may be a secret in the wrong place.
    return unknown_key(unknown[1], known)


def unknown_key(key: str, known: Collection[str]) -> str:
    """What to say of a key that is none of the known ones."""
    # Of a section that is a file, --data=data.yaml, jsonargparse names the inner key alone.
    inner = (new for old, new in RENAMED.items() if old.endswith(f".{key}") and new in known)
    new = current_key(key) if "." in key else RENAMED.get(key) or next(inner, key)
    if new != key:
        return f"{key} is now called {new}"
    return f"unknown key {key}: {f'did you mean {nearest(key, known)}?' if known else 'give no flags'}"


def plain(error: ArgumentError) -> str:
    """jsonargparse's message in the words of the command line, on one line."""
    text = " ".join(str(error.message).split())
    if required := re.fullmatch(r"the following arguments are required: (.*)", text):
        names = (name.rpartition(".")[2] for name in required[1].split(", "))
        return f"missing: {', '.join(names)}"
    if section := _NO_SECTION.fullmatch(text):
        key, value, reason = section.groups()
        # A word may be the name of a YAML file with the section's keys, and then the reason is of its content.
        if not reason.startswith("Parser key"):
            return f"{key}: {reason}, got {value}"
        if "Unable to load config" in reason:
            return f"{key}: expected keys with values, got {value}"
        text = reason
    # Other messages say more, such as how long a list has to be.
    wrong = re.fullmatch(r'Parser key "([\w.]+)": (.*?)(?: Given value type: .*)?(?:Given|Got) value: (.*)', text)
    kinds = dict.fromkeys(re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", wrong[2])) if wrong else {}
    meant = [_KINDS.get(kind) or choices.replace("'", "").replace(", ", " or ") for kind, choices in kinds]
    if wrong is None or not all(meant) or not meant:
        return text
    return f"{wrong[1]} is {wrong[3]}: give {' or '.join(meant)}"
