"""Files that hold what a model is told; users can replace them."""

from pathlib import Path

from rflow_jax.errors import InputError


def read_prompt(path: Path) -> str:
    """The text of a prompt file.

    Raises:
        InputError: there is no such file, or it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read this prompt file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: this prompt file is not in UTF-8") from error
