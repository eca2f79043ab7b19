"""The prompts of FLUX's text encoders, and their tokens."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.tokenizers.patterns import require_bounded
from rflow_jax.utils.file_kinds import stand_in
from rflow_jax.utils.files import LARGEST_TEXT, require_regular
from rflow_jax.utils.json_files import read_object

REFLECTION_MARK = "[Reflexion]"  # as in the training data of the corrector
CLIP_TOKENIZER, T5_TOKENIZER = "tokenizer", "tokenizer_2"  # subfolders of a model
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
    *("vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
log = logging.getLogger(__name__)


def t5_prompt(prompt: str, reflection: str | None = None) -> str:
    """T5's text: the (refined) prompt, and the reflection in the format the corrector was trained with."""
    return f"{prompt} {REFLECTION_MARK} {reflection}" if reflection else prompt


class Tokenizers:
    """The CLIP and the T5 tokenizer of a model folder.

    Args:
        folder: holds ``tokenizer/`` (CLIP) and ``tokenizer_2/`` (T5), as Transformers writes them.

    Raises:
        InputError: one of them is missing or cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._clip, self._t5 = (load_tokenizer(Path(folder) / name) for name in (CLIP_TOKENIZER, T5_TOKENIZER))
        for name, tokenizer in ((CLIP_TOKENIZER, self._clip), (T5_TOKENIZER, self._t5)):
            if tokenizer.pad_token_id is None:
                raise InputError(f"{Path(folder) / name}: the tokenizer has no pad token")

    def clip(self, texts: Sequence[str], max_length: int) -> np.ndarray:
        """[b, max_length] int32, padded; a longer text keeps its beginning and the end token."""
        return _encode(self._clip, texts, max_length, "CLIP")

    def t5(self, texts: Sequence[str], max_length: int) -> np.ndarray:
        """[b, max_length] int32, padded; a longer text keeps its beginning and the end token."""
        return _encode(self._t5, texts, max_length, "T5")

    def lengths(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each text before any cut, [b] int32 each: CLIP's and T5's."""
        clip, t5 = (np.asarray([len(ids) for ids in _ids(one, texts)], np.int32) for one in (self._clip, self._t5))
        return clip, t5


def load_tokenizer(folder: Path) -> Any:
    """Transformers' tokenizer in a folder; raises InputError if there is none."""
    # Otherwise Transformers advises to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow to import, and only needed here

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, so no tokenizer; fetch the whole model folder")
    ready = folder / "tokenizer.json"
    require_tokenizer_files(folder)
    with tokenizer_errors(folder):
        if not ready.is_file():
            _require_no_code(folder)
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return warm_up_tokenizer(found)
        # As saved: Transformers would rebuild T5's from its sentencepiece model, with a warning each time.
        config = read_object(folder / "tokenizer_config.json")
        special = {name: config[name] for name in SPECIAL_TOKENS if config.get(name)}
        # Some versions of Transformers write a token's properties along.
        special = {name: token if isinstance(token, str) else token["content"] for name, token in special.items()}
        return warm_up_tokenizer(PreTrainedTokenizerFast(tokenizer_file=str(ready), **special))


def require_tokenizer_files(folder: Path) -> None:
    """Raises InputError for a tokenizer's files that are no files, stand-ins or unbounded.

    Libraries open them as they are.
    """
    for name in TOKENIZER_FILES:
        if os.path.lexists(path := folder / name):
            require_regular(path, "file of the tokenizer", LARGEST_TEXT)
            if found := stand_in(path):
                raise InputError(f"{path}: {found}")
    if (ready := folder / "tokenizer.json").exists():
        require_bounded(read_object(ready), ready)


@contextmanager
def tokenizer_errors(folder: Path) -> Iterator[None]:
    """Turns what the tokenizers library raises, panics of its Rust code among it, into an InputError."""
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: not a tokenizer ({reason})") from error


def _require_no_code(folder: Path) -> None:
    """Raises InputError where Transformers would run Python that came with the model, or ask whether it may."""
    for path in (folder / "tokenizer_config.json", folder / "config.json"):
        if path.exists() and "auto_map" in read_object(path):
            raise InputError(
                f"{path}: auto_map names Python code of the model's own, which is never run; take a folder with a "
                "tokenizer.json"
            )


def warm_up_tokenizer(tokenizer: Any) -> Any:
    """Calls a tokenizer once, which resets the padding and truncation set in its file.

    Later calls of the same kind only read it, so threads may share it.
    """
    tokenizer("", truncation=False, verbose=False)
    return tokenizer


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens, such as ``<|im_end|>``, which a tokenizer recognises anywhere in a text."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def require_plain(text: str, marks: Iterable[str]) -> str:
    """A user's text; raises InputError if it contains one of these marks, which would end or begin a message."""
    if found := [mark for mark in marks if mark in text]:
        raise InputError(f"the prompt contains the special token {found[0]}: leave it out")
    return text


def _encode(tokenizer: Any, texts: Sequence[str], max_length: int, name: str) -> np.ndarray:
    # Cut and padded here: Transformers takes four times as long for it, and would not say which texts it cuts.
    rows = np.full((len(texts), max_length), tokenizer.pad_token_id, np.int32)
    for row, text, ids in zip(rows, texts, _ids(tokenizer, texts), strict=True):
        if len(ids) > max_length:
            log.warning("%s sees the first %d of %d tokens of %r", name, max_length, len(ids), text[:60])
            ids = [*ids[: max_length - 1], ids[-1]]
        row[: len(ids)] = ids
    return rows


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
