"""Conversion of Qwen2.5-VL: the same numbers in our layout, in either storage; and what is refused."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert_weights.__main__ import main
from rflow_jax.errors import InputError
from rflow_jax.tokenizers.qwen import QwenTokenizer, question
from rflow_jax.weights.loading import parameter_values
from rflow_jax.weights.qwen import end_tokens, load_qwen


@pytest.fixture
def base(golden):
    return golden / "qwen" / "base"


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_the_numbers_come_through(base, tmp_path, storage):
    out = tmp_path / "out"
    assert main(["qwen", str(base), str(out), "--format", storage]) == 0
    want, got = (load_qwen(folder, dtype=jnp.float32) for folder in (base, out))
    for one, other in zip(jax.tree.leaves(nnx.state(got)), jax.tree.leaves(nnx.state(want)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert got.config == want.config
    assert end_tokens(out, got.config) == (496,)
    assert QwenTokenizer(out).chat(question("Hi")) == QwenTokenizer(base).chat(question("Hi"))


def test_another_dtype(base, tmp_path):
    assert main(["qwen", str(base), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    values = parameter_values(load_qwen(tmp_path / "out", dtype=None))
    assert {value.dtype for value in values.values()} == {jnp.dtype(jnp.bfloat16)}


def test_what_is_refused(base, golden, tmp_path):
    shutil.copytree(base, tmp_path / "src")
    tensors = load_file(base / "model.safetensors")
    for change, message in (
        ({"visual.blocks.0.attn.qkv.bias": None}, r"visual\.blocks\.0\.attn\.qkv\.bias missing"),
        ({"model.layers.0.extra.weight": np.zeros(3, np.float32)}, r"model\.layers\.0\.extra\.weight not known"),
        ({"lm_head.weight": np.zeros((3, 64), np.float32)}, r"model\.safetensors: lm_head\.weight has shape"),
        ({"lm_head.weight": np.zeros((513, 64), np.int32)}, r"model\.safetensors: lm_head\.weight is stored as int32"),
    ):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(changed, tmp_path / "src" / "model.safetensors")
        with pytest.raises(InputError, match=message):
            main(["qwen", str(tmp_path / "src"), str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="a reward model, which is read as it is"):
        main(["qwen", str(golden / "qwen" / "reward"), str(tmp_path / "out")])
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    with pytest.raises(InputError, match=r"config\.json: .*'qwen2_vl' is not supported"):
        main(["qwen", str(tmp_path / "src"), str(tmp_path / "out")])


def test_a_converted_model_is_one_already(base, tmp_path):
    main(["qwen", str(base), str(tmp_path / "out")])
    with pytest.raises(InputError, match="converted model already"):
        main(["qwen", str(tmp_path / "out"), str(tmp_path / "again")])
