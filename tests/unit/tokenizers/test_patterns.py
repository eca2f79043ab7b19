"""Patterns of a tokenizer.json: those of published tokenizers are taken, those that may not end are refused."""

from pathlib import Path

import pytest

from rflow_jax.errors import InputError
from rflow_jax.tokenizers.patterns import require_bounded

FILE = Path("model/tokenizer.json")
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"model": {}, "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}}


@pytest.mark.parametrize(
    "pattern",
    [
        QWEN,
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        GPT_4O,
        r" {2,}",
        r"[[:alpha:]]+",
    ],
)
def test_published_patterns_are_taken(pattern):
    require_bounded(tokenizer(pattern), FILE)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"(a+)+$", "within a repetition"),
        (r"(?>(\p{L}*)*)b", "within a repetition"),
        (r"(a|aa)*b", "within a repetition"),
        (r"(?:a?){20}a{20}", "within a repetition"),
        (r"(?=(a+)+b)", "within a repetition"),
        (r"a{1,100000}", "repeats more than 64 times"),
        (r"a{100000}", "repeats more than 64 times"),
        (r"a*a*a*a*a*b", "choices in a row"),
        (r"(a*)(a*)(a*)(a*)(a*)b", "choices in a row"),
        ("a?" * 30 + "a" * 30, "choices in a row"),
        (r"(a*)\1", "refers back"),
        ("(", "cannot be checked"),
        ("a" * 3000, "3,000 letters"),
    ],
)
def test_patterns_that_may_not_end_are_refused(pattern, reason):
    with pytest.raises(InputError, match=rf"^{FILE}: the pattern .* {reason}"):
        require_bounded(tokenizer(pattern), FILE)


def test_replacements_that_grow_are_refused():
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 20}
    require_bounded({"normalizer": step}, FILE)
    with pytest.raises(InputError, match="replacements make too long"):
        require_bounded({"normalizer": {"type": "Sequence", "normalizers": [step] * 3}}, FILE)
