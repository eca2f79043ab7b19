"""Chats as tokens: Qwen's tokenizer and chat template, with a picture's token repeated for each token it gives."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.tokenizers.chat_template import ChatTemplate
from rflow_jax.tokenizers.flux import (
    load_tokenizer,
    require_plain,
    require_tokenizer_files,
    special_tokens,
    tokenizer_errors,
    warm_up_tokenizer,
)
from rflow_jax.typing import Int
from rflow_jax.utils.checks import require_text
from rflow_jax.utils.files import read_text
from rflow_jax.utils.json_files import read_object

IMAGE, VISION_START = "<|image_pad|>", "<|vision_start|>"
_SPECIAL = ("eos_token", "pad_token", "unk_token", "bos_token")
LARGEST_TEMPLATE = 2**18  # bytes; the longest published ones have some thousands
_CONFIG, _TEMPLATES = "tokenizer_config.json", ("chat_template.jinja", "chat_template.json")


class QwenTokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: holds ``tokenizer.json`` (or ``vocab.json`` and ``merges.txt``) and ``tokenizer_config.json``, and the
            chat template in the latter or in a file of its own.
        template_from: another folder to search for the chat template (a checkpoint's folder may lack it).
        added: special tokens to add if the tokenizer does not know them.

    Raises:
        InputError: one of them is missing or cannot be read.
    """

    def __init__(self, folder: Path, *, template_from: Path | None = None, added: Sequence[str] = ()):
        # Otherwise Transformers advises to install PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast  # slow to import, and only needed here

        self.folder = folder
        require_tokenizer_files(folder)
        config = read_object(folder / _CONFIG)
        special = {name: _text(name, config[name], folder / _CONFIG) for name in _SPECIAL if config.get(name)}
        with tokenizer_errors(folder):
            if (ready := folder / "tokenizer.json").is_file() or not (folder / "vocab.json").is_file():
                self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(ready), **special)
            else:
                self._tokenizer = load_tokenizer(folder)
            if added:
                self._tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
            warm_up_tokenizer(self._tokenizer)
        if self._tokenizer.pad_token_id is None:
            raise InputError(f"{folder / _CONFIG}: no pad_token; a batch cannot be padded without one")
        self._marks = special_tokens(self._tokenizer)
        text, self._template_file = _template([folder, *([template_from] if template_from else [])])
        with self._template_errors():
            self._template = ChatTemplate(text)
        self.chat(question("", None))  # so that a broken template is reported before weights are read

    def __len__(self) -> int:
        return len(self._tokenizer)

    @property
    def pad(self) -> int:
        return int(self._tokenizer.pad_token_id)

    @property
    def eos(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, as it stands in the file."""
        return self._tokenizer.get_vocab()

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None if the tokenizer does not have it."""
        return self.vocabulary.get(token)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer with its added tokens in the format of Transformers."""
        self._tokenizer.save_pretrained(folder)

    def require_plain(self, text: str) -> str:
        """A user's text; raises InputError if it contains marks of the chat, which :meth:`encode` recognises."""
        return require_plain(text, self._marks)

    def encode(self, text: str) -> np.ndarray:
        """[t] int32, nothing added and nothing cut; raises InputError if it is not a text."""
        require_text(text, "the text")
        return np.asarray(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    def decode(self, ids: Int[np.ndarray, " t"]) -> str:
        """The text without special tokens."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def chat(self, messages: Sequence[dict[str, Any]], *, answer: bool = True) -> str:
        """A conversation in the model's own form, up to where its answer begins; without ``answer``, up to its end.

        Raises:
            InputError: the template fails.
        """
        with self._template_errors():
            special = self._tokenizer.special_tokens_map
            return self._template.render(list(messages), add_generation_prompt=answer, **special)

    @contextmanager
    def _template_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Jinja raises errors of its own, and those of the template's expressions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self._template_file}: the chat template does not work ({reason})") from error


def question(*parts: str | None, system: str | None = None) -> list[dict[str, Any]]:
    """One message of a user: texts, and None for a picture."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    first = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*first, {"role": "user", "content": content}]


def expand_images(text: str, tokens: Sequence[int]) -> str:
    """Repeats each picture's token by the picture's number of tokens.

    Raises:
        InputError: the text has more or fewer pictures.
    """
    head, *tails = text.split(IMAGE)
    if len(tails) != len(tokens):
        raise InputError(f"the text contains {len(tails)} times {IMAGE}, for {len(tokens)} pictures")
    return head + "".join(IMAGE * count + tail for count, tail in zip(tokens, tails, strict=True))


def _text(name: str, entry: Any, path: Path) -> str:
    """A special token's text; some versions of Transformers write its properties along."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise InputError(f"{path}: {name} is {entry!r}; expected a text, or an object with content")
    return text


def _is_default(template: Any) -> bool:
    return isinstance(template, dict) and template.get("name") == "default"


def _template(folders: Sequence[Path]) -> tuple[str, Path]:
    """The chat template of the first folder that has one, and its file."""
    for folder in folders:
        jinja, as_json = (folder / name for name in _TEMPLATES)
        if jinja.exists():
            return read_text(jinja, "chat template", LARGEST_TEMPLATE), jinja
        for path in (as_json, folder / _CONFIG):
            if path.exists() and (template := read_object(path).get("chat_template")):
                if isinstance(template, list):  # named ones, as Transformers writes several
                    named = [one.get("template") for one in template if _is_default(one)]
                    template = named[0] if named else template
                if not isinstance(template, str):
                    raise InputError(f"{path}: chat_template is a {type(template).__name__}; expected a text")
                return template, path
    raise InputError(f"{folders[0]}: no chat template, neither in {_CONFIG} nor in {' or '.join(_TEMPLATES)}")
