"""The words of the world's prompts and reflections, and tokenizers of CLIP's and T5's kind that know these words.

Each word is one token. Whatever else a text holds becomes bytes (CLIP) or the unknown token (T5). The files are those
of Transformers: its own classes read them, versions 4 and 5 with the same ids.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rflow_jax.shapes.edits import Edit
from rflow_jax.shapes.grammar import COLORS, NUMBERS, SHAPES, Prompt, Wanted, plural, with_article
from rflow_jax.shapes.scenes import THING
from rflow_jax.tokenizers.flux import CLIP_TOKENIZER, REFLECTION_MARK, T5_TOKENIZER
from rflow_jax.verifiers.findings import KEEP
from rflow_jax.verifiers.geneval import RELATIONS
from rflow_jax.weights.model_folder import write_json

CLIP_LENGTH, T5_LENGTH = 32, 40  # tokens; the longest prompt has 16 and 15, with the mark and two orders 34
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"  # with the ids 0, 1, 2, as in every T5

_END_OF_WORD, _SPACE = "</w>", "▁"
_PUNCTUATION = ",."
_ACTIONS = ("color", "replace", "add", "remove", "move")
_SCORE = -1.0  # of every piece: no text can be read in two ways
# CLIP's own pattern: contractions, words, digits one by one, and runs of anything else.
_CLIP_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def words() -> tuple[str, ...]:
    """Every word of prompts and reflections in lower case, without punctuation."""
    sentences = [
        Prompt(tuple(map(Wanted, SHAPES[:3]))).text,
        with_article(next(color for color in COLORS if color[0] in "aeiou")),
        *(Edit(action, SHAPES[0], SHAPES[1], count).text for action in _ACTIONS for count in (1, 2)),
        KEEP,
        REFLECTION_MARK,
    ]
    nouns = (*SHAPES, THING)
    lists = (*NUMBERS, *COLORS, *nouns, *map(plural, nouns), *RELATIONS)
    return tuple(sorted(set(re.findall(r"[a-z]+", " ".join((*sentences, *lists)).lower()))))


def clip_tokenizer() -> Tokenizer:
    """Byte pairs in lower case between a start and an end token."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = byte_pairs([[*word[:-1], word[-1] + _END_OF_WORD] for word in words()])
    tokens = [*characters, *(character + _END_OF_WORD for character in characters), *map("".join, merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, CLIP_START, CLIP_END]))}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges, unk_token=CLIP_END, continuing_subword_prefix="", end_of_word_suffix=_END_OF_WORD
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_CLIP_WORD), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    ends = ((token, vocabulary[token]) for token in (CLIP_END, CLIP_START))
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (CLIP_START, CLIP_END)])
    return tokenizer


def byte_pairs(words: list[list[str]]) -> list[tuple[str, str]]:
    """The merges, the most frequent first, that make one token of every word; its characters are given."""
    merges: list[tuple[str, str]] = []
    parts = [list(word) for word in words]
    while pairs := Counter(pair for word in parts for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in parts:
            for place in range(len(word) - 2, -1, -1):
                if (*word[place : place + 2],) == best:
                    word[place : place + 2] = ["".join(best)]
    return merges


def t5_tokenizer() -> Tokenizer:
    """Whole words and punctuation in lower case before an end token; the mark before a reflection is one token."""
    starts = [*words(), REFLECTION_MARK.lower(), *_PUNCTUATION]
    pieces = [T5_PAD, T5_END, T5_UNKNOWN, *_PUNCTUATION, *(_SPACE + word for word in starts)]
    scores = [(piece, 0.0 if number < 3 else _SCORE) for number, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=pieces.index(T5_UNKNOWN), byte_fallback=False))
    # Transformers 5 takes the pieces and this kind of normaliser from the file, and no other.
    tokenizer.normalizer = normalizers.Precompiled(_lower_case())
    spaces = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always", split=True)
    end = (T5_END, pieces.index(T5_END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", T5_END], pair=["$A", T5_END, "$B", T5_END], special_tokens=[end]
    )
    special = [AddedToken(token, normalized=False, special=True) for token in (T5_PAD, T5_END, T5_UNKNOWN)]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _lower_case() -> bytes:
    """Sentencepiece's table of replacements (a double-array trie, then texts that end in zeros) for A to Z.

    The root leads to the unit 256 + byte, and that to its leaf at 512 + byte, which holds the place of the text.
    """
    units = [0] * 768
    units[0] = 256 << 10  # the distance to the children is in the bits from the tenth
    letters = range(ord("A"), ord("Z") + 1)
    for number, letter in enumerate(letters):
        units[256 + letter] = letter | 1 << 8 | ((256 + letter) ^ (512 + letter)) << 10
        units[512 + letter] = 1 << 31 | 2 * number
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + b"".join(bytes([letter, 0]).lower() for letter in letters)


def write_tokenizers(folder: Path) -> None:
    """Writes ``tokenizer/`` (CLIP) and ``tokenizer_2/`` (T5) into a model folder."""
    common: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    clip, t5 = folder / CLIP_TOKENIZER, folder / T5_TOKENIZER
    tokenizers = {clip: clip_tokenizer(), t5: t5_tokenizer()}
    for path, tokenizer in tokenizers.items():
        path.mkdir(parents=True)
        tokenizer.save(str(path / "tokenizer.json"))
    tokenizers[clip].model.save(str(clip))  # vocab.json and merges.txt, for the class without the library
    tokens = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": CLIP_END}
    kind = {"tokenizer_class": "CLIPTokenizer", "errors": "replace", "model_max_length": CLIP_LENGTH}
    write_json(clip / "tokenizer_config.json", common | kind | tokens)
    tokens = {"eos_token": T5_END, "unk_token": T5_UNKNOWN, "pad_token": T5_PAD}
    kind = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "model_max_length": T5_LENGTH}
    write_json(t5 / "tokenizer_config.json", common | kind | tokens)
