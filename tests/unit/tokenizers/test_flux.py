"""FLUX's tokens against Transformers' own padding and truncation."""

import logging

import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.tokenizers.flux import Tokenizers, load_tokenizer
from rflow_jax.weights.hub import BUNDLED

FOLDER = BUNDLED[0] / "shapes"
TEXTS = ["", "a photo of a red star", "two blue rings " * 40, "naïve ☃ 星\n\ttabs", "a photo of a red star " * 3]


@pytest.mark.parametrize(("subfolder", "encoder"), [("tokenizer", "clip"), ("tokenizer_2", "t5")])
@pytest.mark.parametrize("max_length", [2, 9, 64])
def test_tokens_are_those_of_transformers(subfolder: str, encoder: str, max_length: int):
    tokens = getattr(Tokenizers(FOLDER), encoder)(TEXTS, max_length)
    settings = {"padding": "max_length", "max_length": max_length, "truncation": True, "return_tensors": "np"}
    expected = load_tokenizer(FOLDER / subfolder)(TEXTS, **settings)["input_ids"]
    np.testing.assert_array_equal(tokens, expected)
    assert tokens.dtype == np.int32


def test_a_text_that_is_cut_is_named(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        Tokenizers(FOLDER).t5(TEXTS, 16)
    assert [message.split("tokens of")[0] for message in caplog.messages] == [
        "T5 sees the first 16 of 121 ",
        "T5 sees the first 16 of 19 ",
    ]


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((FOLDER / name / "tokenizer.json").read_bytes())
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer has no pad token"):
        Tokenizers(tmp_path)
