"""Checkpoints in fewer bits: float8 with scales becomes bfloat16, the other kinds are named."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.models.text_encoders import T5Config, T5Encoder
from rflow_jax.weights.components import T5
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import load_into, parameter_values
from rflow_jax.weights.mappings import text_encoders
from rflow_jax.weights.pytorch_files import open_pickle
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import save_tensors
from tests.kit.encoders import random_model

E4M3, E5M2, BFLOAT16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16
DRAW = np.random.default_rng(0)
ROWS = DRAW.random(6).astype(np.float32)
WEIGHT = DRAW.standard_normal((6, 5)).astype(np.float32)


def read(folder, tensors):
    save_tensors(folder / "x.safetensors", tensors)
    return TensorFiles.open(folder / "x.safetensors")


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2, BFLOAT16])
@pytest.mark.parametrize("scale", [np.float32(0.37), np.full(1, 3.1e-3, BFLOAT16), ROWS, ROWS[:, None]])
def test_scaled_weights_are_multiplied_in_float32_and_rounded_once(tmp_path, name, dtype, scale):
    stored, scale = WEIGHT.astype(dtype), np.asarray(scale)
    extra = {"b.input_scale": np.ones(1, np.float32), "b.scale_input": np.ones(()), "scaled_fp8": np.zeros(2, E4M3)}
    files = read(tmp_path, {"b.weight": stored, f"b.{name}": scale, "b.bias": WEIGHT[0]} | extra)
    assert files.shapes == {"b.weight": (6, 5), "b.bias": (5,)}
    factor = scale.astype(np.float32).reshape(-1, 1)
    want = (stored.astype(np.float32) * factor).astype(BFLOAT16)
    assert files["b.weight"].nbytes == want.nbytes == 60
    for value in (files.read("b.weight"), dict(files.stream())["b.weight"]):
        assert value.dtype == BFLOAT16
        np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(files.read("b.bias"), WEIGHT[0])


def test_pieces_make_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("rflow_jax.weights.reduced_precision._PIECE", 10)
    scale = DRAW.random((6, 1)).astype(np.float32)
    files = read(tmp_path, {"weight": WEIGHT.astype(E4M3), "b.weight": WEIGHT.astype(E4M3), "b.scale_weight": scale})
    np.testing.assert_array_equal(
        files.read("b.weight"), (files.read("weight").astype(np.float32) * scale).astype(BFLOAT16)
    )


def test_plain_float8_stays_as_it_is(tmp_path):
    assert read(tmp_path, {"b.weight": WEIGHT.astype(E4M3)}).read("b.weight").dtype == E4M3


def test_an_encoder_in_scaled_float8_is_that_of_its_numbers(tmp_path):
    """The whole path, from ComfyUI's file to parameters."""
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    values = {path: np.asarray(value) for path, value in parameter_values(random_model(T5Encoder, config)).items()}
    the_plan = plan(text_encoders.T5, {path: value.shape for path, value in values.items()})
    tensors, plain = {"scaled_fp8": np.zeros(0, E4M3)}, {}
    for key in the_plan.entries:
        value = the_plan.join(key, values)
        if value.ndim == 2 and "block" in key:
            scale = np.abs(value).max() / 448
            tensors |= {key: (value / scale).astype(E4M3), key.replace(".weight", ".scale_weight"): np.float32(scale)}
            plain[key] = (tensors[key].astype(np.float32) * np.float32(scale)).astype(BFLOAT16)
        else:
            tensors[key] = plain[key] = value
    save_tensors(tmp_path / "plain.safetensors", plain)
    got, want = (
        parameter_values(load_into(T5.abstract(config), text_encoders.t5_mapping(files), files))
        for files in (read(tmp_path, tensors), TensorFiles.open(tmp_path / "plain.safetensors"))
    )
    for path, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value), err_msg=path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"b.weight.absmax": np.ones(2), "b.weight.quant_state.bitsandbytes__nf4": np.ones(9, np.uint8)},
            "4 bits .*nf4",
        ),
        (
            {"b.weight.absmax": np.ones(2), "b.weight.quant_state.bitsandbytes__fp4": np.ones(9, np.uint8)},
            "4 bits .*fp4",
        ),
        ({"b.weight.absmax": np.ones(2)}, "few bits by bitsandbytes"),
        ({"b.SCB": np.ones(2)}, "int8 by bitsandbytes"),
        ({"b.qweight": np.ones(2, np.int32), "b.qzeros": np.ones(2, np.int32)}, "few bits by GPTQ or AWQ"),
        ({"b.qweight": np.ones(2, np.int32), "b.wscales": np.ones(2)}, "4 bits by SVDQuant"),
        ({"b.weight_scale": np.ones(1), "b.weight_scale_2": np.ones(1)}, "4 bits \\(nvfp4\\)"),
        ({"b.weight_packed": np.ones(2, np.int32)}, "packed integers of compressed-tensors"),
        ({"b.weight._data": np.ones(2, np.int8)}, "few bits by quanto"),
        ({"b.weight": np.ones((2, 2), np.int8), "b.weight_scale": np.ones(2)}, "int8 with scales"),
        ({"b.weight": np.ones((2, 2), E4M3), "b.weight_scale": np.ones(2, np.uint8)}, "uint8 with scales"),
    ],
)
def test_other_kinds_are_named(tmp_path, tensors, message):
    with pytest.raises(InputError, match=rf"x\.safetensors: stored in {message}.*, as b\..* says, which is not read"):
        read(tmp_path, tensors)


@pytest.mark.parametrize("shape", [(2,), (5,), (1, 6), (3, 2), (6, 1, 1)])
def test_scales_of_another_shape(tmp_path, shape):
    with pytest.raises(InputError, match=r"b\.weight_scale has shape .*expected one number, or one for each row"):
        read(tmp_path, {"b.weight": WEIGHT.astype(E4M3), "b.weight_scale": np.ones(shape)})


@pytest.mark.parametrize("scale", [np.float32(3e38), np.float32(np.nan), np.full((6, 1), 3e38, np.float32)])
def test_what_a_scale_makes_infinite_is_refused(tmp_path, scale):
    files = read(tmp_path, {"b.weight": np.full((6, 5), 9, E4M3), "b.weight_scale": scale})
    with pytest.raises(InputError, match=r"x\.safetensors: b\.weight.* has numbers that are NaN or infinite"):
        files.read("b.weight")


@pytest.mark.parity
def test_pickles_with_scales(tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    stored = torch.from_numpy(WEIGHT).to(torch.float8_e4m3fn)
    torch.save({"b.weight": stored, "b.scale_weight": torch.tensor(0.3)}, tmp_path / "x.pt")
    value = open_pickle(tmp_path / "x.pt", allow=True).read("b.weight")
    want = (stored.float() * torch.tensor(0.3)).to(torch.bfloat16)
    np.testing.assert_array_equal(value.astype(np.float32), want.float().numpy())


@pytest.mark.parametrize("shape", [(300, 200), (128, 256), (1, 129), (256, 1)])
def test_a_scale_for_each_block(tmp_path, shape):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(E4M3)
    scale = rng.uniform(0.01, 2, [-(-size // 128) for size in shape]).astype(np.float32)
    got = read(tmp_path, {"b.weight": weight, "b.weight_scale_inv": scale})
    wanted = weight.astype(np.float32) * scale.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
    assert list(got) == ["b.weight"]
    np.testing.assert_array_equal(got.read("b.weight"), wanted.astype(BFLOAT16))
