"""Chats as tokens: Qwen's tokenizer and chat template, with a picture's token repeated for each token it gives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rflow_jax.errors import InputError
from rflow_jax.tokenizers.flux import require_plain, special_tokens, warm_up_tokenizer
from rflow_jax.typing import Int
from rflow_jax.utils.checks import require_text
from rflow_jax.utils.json_files import read_object

IMAGE, VISION_START = "<|image_pad|>", "<|vision_start|>"
_SPECIAL = ("eos_token", "pad_token", "unk_token", "bos_token")
_CONFIG, _TEMPLATES = "tokenizer_config.json", ("chat_template.jinja", "chat_template.json")


class QwenTokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: holds ``tokenizer.json`` and ``tokenizer_config.json``, and the chat template in the latter or in a file
            of its own.
        template_from: where the chat template is looked for too (a checkpoint's folder may hold tokens alone).
        added: special tokens to add where the tokenizer does not know them.

    Raises:
        InputError: one of them is missing or cannot be read.
    """

    def __init__(self, folder: Path, *, template_from: Path | None = None, added: Sequence[str] = ()):
        # Else it advises everyone to install PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import PreTrainedTokenizerFast  # slow to import, and only needed here

        self.folder = folder
        config = read_object(folder / _CONFIG)
        special = {name: _text(name, config[name], folder / _CONFIG) for name in _SPECIAL if config.get(name)}
        try:
            self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise InputError(f"{folder}: not a tokenizer ({str(error).splitlines()[0]})") from error
        if added:
            self._tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
        warm_up_tokenizer(self._tokenizer)
        if self._tokenizer.pad_token_id is None:
            raise InputError(f"{folder / _CONFIG}: no pad_token; a batch cannot be padded without one")
        self._marks = special_tokens(self._tokenizer)
        self._template, self._said_by = _template([folder, *([template_from] if template_from else [])])
        self.chat(question("", None))  # a template that does not work is said before weights are read

    def __len__(self) -> int:
        return len(self._tokenizer)

    @property
    def pad(self) -> int:
        return int(self._tokenizer.pad_token_id)

    @property
    def eos(self) -> int | None:
        return self._tokenizer.eos_token_id

    def id_of(self, token: str) -> int | None:
        """The number of a token, or None where the tokenizer does not know it as one."""
        return self._tokenizer.get_vocab().get(token)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer with the tokens that were added, as Transformers reads it."""
        self._tokenizer.save_pretrained(folder)

    def require_plain(self, text: str) -> str:
        """What a user says; raises InputError if it holds marks of the chat, which :meth:`encode` takes as such."""
        return require_plain(text, self._marks)

    def encode(self, text: str) -> np.ndarray:
        """[t] int32, nothing added and nothing cut; raises InputError for what is no text."""
        require_text(text, "the text")
        return np.asarray(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    def decode(self, ids: Int[np.ndarray, " t"]) -> str:
        """The text without special tokens."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def chat(self, messages: Sequence[dict[str, Any]], *, answer: bool = True) -> str:
        """A conversation in the model's own form, up to where its answer begins; without ``answer``, up to its end.

        Raises:
            InputError: the template refuses it.
        """
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=answer
            )
        except Exception as error:  # Jinja raises errors of its own, and those of the template's expressions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{self._said_by}: the chat template does not work ({reason})") from error


def question(*parts: str | None, system: str | None = None) -> list[dict[str, Any]]:
    """One message of a user: texts, and None for a picture."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    first = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*first, {"role": "user", "content": content}]


def expand_images(text: str, tokens: Sequence[int]) -> str:
    """Repeats each picture's token as often as the picture gives tokens.

    Raises:
        InputError: the text speaks of more or fewer pictures.
    """
    head, *tails = text.split(IMAGE)
    if len(tails) != len(tokens):
        raise InputError(f"the text holds {len(tails)} times {IMAGE}, for {len(tokens)} pictures")
    return head + "".join(IMAGE * count + tail for count, tail in zip(tokens, tails, strict=True))


def _text(name: str, entry: Any, path: Path) -> str:
    """A special token's text; some versions of Transformers write its properties along."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str):
        raise InputError(f"{path}: {name} is {entry!r}; expected a text, or an object with content")
    return text


def _template(places: Sequence[Path]) -> tuple[str, Path]:
    """The chat template of the first folder that has one, and the file that holds it."""
    for folder in places:
        jinja, as_json = (folder / name for name in _TEMPLATES)
        if jinja.is_file():
            try:
                return jinja.read_text(encoding="utf-8"), jinja
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{jinja}: cannot be read ({error})") from error
        for path in (as_json, folder / _CONFIG):
            if path.is_file() and (template := read_object(path).get("chat_template")):
                if not isinstance(template, str):
                    raise InputError(f"{path}: chat_template is a {type(template).__name__}; expected a text")
                return template, path
    raise InputError(f"{places[0]}: no chat template, neither in {_CONFIG} nor in {' or '.join(_TEMPLATES)}")
