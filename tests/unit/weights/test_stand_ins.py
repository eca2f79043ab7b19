"""Git LFS pointers among the files of a model folder, whichever model it is."""

import pytest

from rflow_jax.errors import InputError
from rflow_jax.tokenizers.flux import load_tokenizer
from rflow_jax.weights.components import read_clip_config
from rflow_jax.weights.nvila import PARTS, read_nvila_config
from rflow_jax.weights.qwen import read_qwen_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (read_qwen_config, "merges.txt"),
        (read_clip_config, "vocab.json"),
        (read_nvila_config, "llm/merges.txt"),
        (load_tokenizer, "spiece.model"),
    ],
)
def test_a_pointer_is_named(tmp_path, read, name):
    for part in ("", *PARTS):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(InputError, match=rf"^{tmp_path / name}: a Git LFS pointer"):
        read(tmp_path)
