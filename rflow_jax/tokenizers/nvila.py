"""NVILA's tokenizer: texts -> the layout of the language model's input, and the words of its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rflow_jax.errors import InputError
from rflow_jax.models.nvila import IMAGE, MEDIA, NEWLINE, Layout, Marks, lay_out, without_marks
from rflow_jax.models.qwen2.config import Qwen2Config
from rflow_jax.tokenizers.flux import load_tokenizer, require_plain, special_tokens
from rflow_jax.utils.json_files import read_object

LONGEST = 2**31  # Transformers writes an astronomical number where there is no limit


class NvilaTokenizer:
    """The tokenizer in a checkpoint's ``llm`` folder, with the tokens of :data:`MEDIA` added where it lacks them.

    These alone may have no row in the network's embedding, to which VILA would add some: pictures' features take the
    place of ``<image>``, and the other two are in no input.

    Attributes:
        marks: ids that the layout depends on.
        yes, no: ids of the two answers.
        size: its tokens that have a row in the network's embedding; rows from there on are unused.
        context: the longest input, with its answer.
        end: id that ends an answer.
        pad: id that fills a batch.

    Raises:
        InputError: there is no tokenizer, or it lacks a token that NVILA needs.
    """

    def __init__(self, folder: Path, language: Qwen2Config):
        self._tokenizer: Any = load_tokenizer(folder)
        self._folder = folder
        self._tokenizer.add_tokens([token for token in MEDIA if token not in self._vocabulary], special_tokens=True)
        self._marks = special_tokens(self._tokenizer)
        self.size = min(len(self._tokenizer), language.vocab_size)
        self.end, self.pad = (self._special(name) for name in ("eos_token_id", "pad_token_id"))
        newline = tuple(self.ids(NEWLINE))
        self.marks = Marks(self._one(IMAGE), newline, frozenset((self.end, self.pad)))
        self.yes, self.no = self._one("yes"), self._one("no")
        self.context = min(_longest(folder), language.max_position_embeddings)
        last, token = max((number, token) for token, number in self._vocabulary.items() if token not in MEDIA)
        if last >= language.vocab_size:
            raise InputError(f"{folder}: {token!r} is token {last}, the network's vocab_size is {language.vocab_size}")

    @property
    def _vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, marks such as ``<|im_end|>`` in it included."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def require_plain(self, text: str) -> None:
        """Raises InputError if a user's text contains marks other than a picture's, which a message drops anyway."""
        require_plain(without_marks(text), self._marks)

    def word(self, token: int) -> str:
        """The text of one token."""
        return self._tokenizer.decode([token])

    def layout(self, text: str, picture_tokens: int) -> Layout:
        """The input for a text: each picture's mark becomes ``picture_tokens`` positions and a newline."""
        return lay_out(self.ids(text), self.marks, picture_tokens)

    def _one(self, word: str) -> int:
        ids = self.ids(word)
        if len(ids) != 1:
            raise InputError(f"{self._folder}: {word!r} is {len(ids)} tokens; NVILA's tokenizer has one for it")
        return ids[0]

    def _special(self, name: str) -> int:
        token = getattr(self._tokenizer, name)
        if token is None:
            raise InputError(f"{self._folder}: the tokenizer has no {name.removesuffix('_id')}")
        return token


def _longest(folder: Path) -> int:
    """The longest input, as in VILA: from the network's config if it has one, else from the tokenizer's."""
    for file in ("config.json", "tokenizer_config.json"):
        limit = read_object(folder / file).get("model_max_length") if (folder / file).is_file() else None
        if isinstance(limit, int | float) and limit > 0:
            return int(min(limit, LONGEST))
    return LONGEST
