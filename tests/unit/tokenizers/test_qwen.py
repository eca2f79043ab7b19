"""Qwen's tokenizer in the forms in which it is published."""

import shutil

from rflow_jax.tokenizers.qwen import QwenTokenizer, question


def test_without_the_ready_made_file(golden, tmp_path):
    """Vocabulary and merges alone are the same tokenizer."""
    folder, bare = golden / "qwen" / "base", tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer.json", "*.safetensors"))
    ready, made = (QwenTokenizer(one, added=["<|VQ_reward|>"]) for one in (folder, bare))
    assert made.vocabulary == ready.vocabulary
    assert (made.pad, made.eos) == (ready.pad, ready.eos)
    for text in ("a bench\n  é 中<|im_start|>x<|VQ_reward|>", "  two clocks "):
        assert made.encode(text).tolist() == ready.encode(text).tolist()
        assert made.chat(question(None, text)) == ready.chat(question(None, text))
