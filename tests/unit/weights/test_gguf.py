"""GGUF files: transformers and T5 encoders, in every kind that the package dequantizes, against that package."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer, abstract_flux
from rflow_jax.models.text_encoders import T5Config, T5Encoder
from rflow_jax.weights.components import T5, TRANSFORMER
from rflow_jax.weights.convert import convert_flux
from rflow_jax.weights.flux import describe
from rflow_jax.weights.gguf_io import GgufFiles, open_file
from rflow_jax.weights.key_mapping import KeyMapping, plan
from rflow_jax.weights.loading import load_into, parameter_values
from rflow_jax.weights.mappings import text_encoders
from rflow_jax.weights.mappings.flux import BFL
from rflow_jax.weights.mappings.text_encoders import T5_GGUF, t5_mapping
from rflow_jax.weights.model_folder import load_stored
from tests.kit.encoders import random_model

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
Kind = gguf.GGMLQuantizationType
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLUX = FluxConfig(
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=32,
    num_attention_heads=1,
    joint_attention_dim=32,
    pooled_projection_dim=32,
    axes_dims_rope=(4, 14, 14),
)
WRITABLE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0)


def write(path: Path, architecture: str, tensors: dict[str, tuple[np.ndarray, Any]]) -> Path:
    """A file of these tensors, whose numbers or blocks are stored as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(network, config, table: KeyMapping) -> tuple[dict[str, tuple[np.ndarray, Any]], dict[str, np.ndarray]]:
    """A random network's tensors in all kinds in turn, and our parameters of what they stand for."""
    values = {path: np.asarray(value) for path, value in parameter_values(random_model(network, config)).items()}
    the_plan = plan(table, {path: value.shape for path, value in values.items()})
    stored: dict[str, tuple[np.ndarray, Any]] = {}
    parameters: dict[str, np.ndarray] = {}
    for number, key in enumerate(the_plan.entries):
        whole = the_plan.join(key, values)
        kind = WRITABLE[number % len(WRITABLE)] if whole.ndim == 2 and whole.shape[1] % 32 == 0 else Kind.F32
        stored[key] = gguf.quants.quantize(whole, kind), kind
        number_of = gguf.quants.dequantize(stored[key][0], kind).reshape(whole.shape).astype(BFLOAT16)
        parameters |= {target.path: target.to_ours(rows) for target, rows in the_plan.split(key, number_of)}
    return stored, parameters


def assert_same(model, want: dict[str, np.ndarray]) -> None:
    got = parameter_values(model)
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), value, err_msg=path)


def test_a_transformer_from_the_file_to_the_folder(tmp_path):
    stored, want = quantized(FluxTransformer, FLUX, BFL)
    assert {kind for _, kind in stored.values()} == {*WRITABLE}
    file = write(tmp_path / "flux1-dev-Q8_0.gguf", "flux", stored)
    convert_flux(file, tmp_path / "out")
    config = TRANSFORMER.read_config(tmp_path / "out")
    assert config == FLUX
    assert_same(load_stored(abstract_flux(config), tmp_path / "out" / "transformer"), want)
    assert describe(tmp_path).components["transformer"] == file  # alone in its folder


def test_a_t5_encoder_in_the_names_of_llama_cpp(tmp_path):
    config = T5Config(vocab_size=48, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    stored, want = quantized(T5Encoder, config, T5_GGUF)
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, config.num_layers)
    for module in {path.rpartition(".")[0] for path in want}:
        assert T5_GGUF.module(module)[1] == theirs.get_name(text_encoders.T5.module(module)[1])
    files = open_file(write(tmp_path / "t5.gguf", "t5encoder", stored))
    assert_same(load_into(T5.abstract(config), t5_mapping(files), files), want)


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q3_K, Kind.IQ4_XS])
def test_kinds_that_the_package_only_reads(tmp_path, monkeypatch, kind):
    """Random blocks with sound scales; the axes of the file are ours in reverse."""
    monkeypatch.setattr("rflow_jax.weights.gguf_io._PIECE", 600)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (5, 2, size), dtype=np.uint8)
    halves = blocks.view(np.float16)  # whatever is a scale in it is a small number
    halves[~(np.abs(halves) < 8)] = 0.25
    rows = blocks.reshape(5, 2 * size)
    files = open_file(write(tmp_path / "x.gguf", "flux", {"a": (rows, kind)}))
    assert files.shapes == {"a": (5, 2 * block)}
    value = files.read("a")
    assert value.dtype == BFLOAT16
    np.testing.assert_array_equal(value, gguf.quants.dequantize(rows, kind).astype(BFLOAT16))


class TestErrors:
    def test_without_the_package(self, tmp_path, monkeypatch):
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            InputError, match=r"x\.gguf: reading GGUF needs the package gguf: pip install 'rflow_jax\[gguf\]'"
        ):
            open_file(tmp_path / "x.gguf")

    @pytest.mark.parametrize("kind", [Kind.I32, Kind.F64])
    def test_a_kind_that_is_not_read(self, tmp_path, kind):
        numbers = np.zeros((2, 32), np.int32 if kind == Kind.I32 else np.float64)
        with pytest.raises(InputError, match=rf"x\.gguf: a is stored as {kind.name}, which the package gguf does not"):
            open_file(write(tmp_path / "x.gguf", "flux", {"a": (numbers, kind)}))

    def test_another_network(self, tmp_path):
        file = write(tmp_path / "x.gguf", "llama", {"a": (np.zeros((2, 32), np.float32), Kind.F32)})
        with pytest.raises(InputError, match=r"x\.gguf: a GGUF of llama, not a FLUX transformer"):
            describe(file)

    @pytest.mark.parametrize("length", [3, 8, 20, 60, 100, 150, -1, -64])
    def test_cut_short(self, tmp_path, length):
        file = write(tmp_path / "x.gguf", "flux", {"a": (np.zeros((2, 32), np.float32), Kind.F32)})
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(
            InputError, match=r"x\.gguf: not a GGUF file, or cut short \(.*\); copy or download"
        ) as error:
            GgufFiles(file)
        assert "\n" not in str(error.value)

    def test_a_pointer(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(InputError, match=r"x\.gguf: a Git LFS pointer"):
            open_file(tmp_path / "x.gguf")

    def test_numbers_that_are_not_finite(self, tmp_path):
        numbers = np.full((1, 32), np.inf, np.float32)
        files = open_file(write(tmp_path / "x.safetensors", "flux", {"a": (numbers, Kind.F32)}))  # by its first bytes
        with pytest.raises(InputError, match="a has numbers that are NaN or infinite"):
            files.read("a")


def _header(tensors=1, pairs=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def _text(content):
    return struct.pack("<Q", len(content)) + content


def _tensor(shape, kind=0, offset=0):
    return _text(b"x") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "only 0 bytes"),
        (b"z" * 100, "does not begin with GGUF"),
        (_header()[:20], "only 20 bytes"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (_header(tensors=2**60), "1,152,921,504,606,846,976 tensors, in a file of 24 bytes"),
        (_header(pairs=2**60), "settings, in a file of 24 bytes"),
        (
            _header(rest=struct.pack("<Q", 2**50) + bytes(40)),
            "the name of tensor 1 of 1 has 1,125,899,906,842",
        ),
        (
            _header(0, 1, _text(b"a") + struct.pack("<IIQ", 9, 4, 2**40)),
            "setting 1 of 1 is a list of 1,099,511",
        ),
        (_header(0, 1, _text(b"a") + struct.pack("<I", 9) * 6 + bytes(64)), "setting 1 of 1"),
        (_header(0, 1, _text(b"general.alignment") + struct.pack("<II", 4, 0)), "an alignment of 0 bytes"),
        (_header(rest=_tensor([2**40, 2**40])), "x has the shape .* in a file of"),
        (_header(rest=_tensor([4], offset=2**50)), "x has the shape .* at byte 1,125,899,906,842,624"),
        (_header(rest=_tensor([4], kind=999)), "type 999, which is not known"),
        (_header(rest=_text(b"x") + struct.pack("<I", 2**31) + bytes(40)), "x has 2,147,483,648 axes"),
    ],
)
def test_a_header_is_not_believed(tmp_path, content, message):
    file = tmp_path / "z.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{file}: not a GGUF file, or cut short \(.*{message}"):
        open_file(file)
