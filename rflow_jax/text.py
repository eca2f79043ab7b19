"""What can be told to a model and written to a file."""

from rflow_jax.errors import InputError


def require_text(text: str, where: str) -> str:
    """The text; raises InputError, which begins with ``where``, if UTF-8 cannot hold it.

    JSON may hold half a surrogate pair, and so may a command line of other bytes; no tokenizer and no file takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds half a surrogate pair, which is no text") from error
    return text
