"""A number that is none ends the reading of any weights, with the names of file and tensor."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from rflow_jax.data.sources.latents import COMPLETE, SETTINGS, SHARED, LatentMetadata, open_latents
from rflow_jax.data.transforms import Drops
from rflow_jax.errors import InputError
from rflow_jax.utils.cli import run
from rflow_jax.weights import finite, safetensors_io
from rflow_jax.weights.convert import Options, convert_flux
from rflow_jax.weights.finite import all_finite
from rflow_jax.weights.flux import load_flux
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.weights.pytorch_files import open_pickle
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import save_tensors

FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
WHOLE = [np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]
SAID = "has numbers that are NaN or infinite"


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_all_patterns_of_small_types(dtype):
    size = np.dtype(dtype).itemsize
    every = np.arange(256**size, dtype=f"u{size}").view(dtype)
    wanted = np.isfinite(every.astype(np.float32))
    assert not wanted.all()
    assert [all_finite(one) for one in every.reshape(-1, 1)[:: 7 if size == 2 else 1]] == list(
        wanted[:: 7 if size == 2 else 1]
    )
    assert all_finite(every[wanted])
    assert not any(all_finite(np.append(every[wanted], one)) for one in every[~wanted][:: 63 if size == 2 else 1])


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_place_of_a_tensor(dtype, tmp_path, monkeypatch):
    """Pieces and blocks are small here, so that each has a beginning and an end."""
    monkeypatch.setattr(safetensors_io, "_PIECE", 4096)
    monkeypatch.setattr(safetensors_io, "BLOCK", 1024)
    monkeypatch.setattr(finite, "BLOCK", 256)
    info = ml_dtypes.finfo(dtype)
    sound = np.resize(np.asarray([0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, 1.5, -2.5], dtype), (9, 631))
    file = tmp_path / "a.safetensors"
    save_tensors(file, {"sound": sound, "none": np.zeros((0, 3), dtype), "one": np.asarray(1, dtype)})
    for key, value in TensorFiles.open(file).stream():
        assert value.dtype == dtype, key
    np.testing.assert_array_equal(TensorFiles.open(file).read("sound"), sound)
    bad = [np.nan, -np.nan] + ([np.inf, -np.inf] if dtype is not ml_dtypes.float8_e4m3fn else [])
    for value in bad:
        for place in (0, 1, 255, 1024, 4095, sound.size - 1):
            broken = sound.copy()
            broken.reshape(-1)[place] = value
            save_tensors(file, {"sound": sound, "layer.weight": broken})
            with pytest.raises(InputError, match=rf"a\.safetensors: layer\.weight {SAID}"):
                dict(TensorFiles.open(file).stream())


@pytest.mark.parametrize("dtype", WHOLE)
def test_whole_numbers_are_always_finite(dtype, tmp_path):
    bits = np.arange(256, dtype=np.uint8).repeat(8) & (1 if dtype is np.bool_ else 255)
    save_tensors(tmp_path / "a.safetensors", {"a": bits.view(dtype)})
    np.testing.assert_array_equal(TensorFiles.open(tmp_path / "a.safetensors").read("a"), bits.view(dtype))


def poison(folder, value=np.nan):
    """Puts one number into the last tensor of a folder's only file, or a file; returns its name."""
    file = folder if folder.is_file() else next(folder.glob("*.safetensors"))
    files = TensorFiles.open(file)
    tensors = dict(files.stream())
    key = max(key for key in tensors if tensors[key].dtype != np.int64)
    tensors[key] = tensors[key].copy()
    tensors[key].reshape(-1)[-1] = value
    save_tensors(file, tensors, files.metadata)
    return file, key


def load(model, lora=None):
    return load_flux(str(model), lora=lora, lora_alpha=None, dtype="bfloat16", progress=False)


@pytest.fixture
def model(golden, tmp_path):
    shutil.copytree(golden / "pipeline", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("network", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_model_with_one_such_number_is_not_loaded_nor_converted(network, model, tmp_path):
    file, key = poison(model / network, -np.inf)
    words = rf"^{file}: {key} {SAID}"
    with pytest.raises(InputError, match=words):
        load(model)
    for storage in ("safetensors", "orbax") if network == "vae" else ("safetensors",):
        with pytest.raises(InputError, match=words):
            convert_flux(model, tmp_path / "out", Options(storage=storage))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_a_converted_model(storage, model, tmp_path, monkeypatch):
    if storage == "safetensors":
        convert_flux(model, tmp_path / "out")
        file, key = poison(tmp_path / "out/vae")
    else:  # made by a version that did not look
        poison(model / "vae")
        with monkeypatch.context() as unchecked:
            unchecked.setattr(finite.Bits, "finite", lambda *_: True)
            convert_flux(model, tmp_path / "out", Options(storage="orbax"))
        file, key = tmp_path / "out/vae/params", r"\S+"
    with pytest.raises(InputError, match=rf"^{file}: {key} {SAID}"):
        load(tmp_path / "out")


def test_a_lora(model, golden, tmp_path, capsys):
    shutil.copy(golden / "lora/pytorch_lora_weights.safetensors", tmp_path / "lora.safetensors")
    file, key = poison(tmp_path / "lora.safetensors")
    words = f"{file}: {key} {SAID}"
    with pytest.raises(InputError) as found:
        read_lora(file)
    assert str(found.value).startswith(words)
    with pytest.raises(InputError) as found:
        load(model, str(file))
    assert str(found.value).startswith(words)
    assert run(lambda: len(read_lora(file))) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parity
def test_a_pickle(tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        torch.save({"a": torch.tensor([1.0, float("nan")]).to(dtype), "b": torch.ones(2)}, tmp_path / "a.pt")
        files = open_pickle(tmp_path / "a.pt", allow=True)
        assert files.read("b").tolist() == [1, 1]
        with pytest.raises(InputError, match=rf"a\.pt: a {SAID}"):
            files.read("a")


def test_precomputed_latents(tmp_path):
    settings = LatentMetadata("m", "i", 32, 16, "center", 12, "float32", "f")
    (tmp_path / SETTINGS).write_text(json.dumps(vars(settings)))
    (tmp_path / COMPLETE).write_text('{"general": 1}')
    shared = {name: np.ones(3, np.float32) for name in ("black_mean", "black_logvar", "empty_text")}
    save_tensors(tmp_path / SHARED, shared)
    parts = ("good_mean", "good_logvar", "bad_mean", "bad_logvar", "pooled", "text", "text_with_reflection")
    record = {f"0.{name}": np.ones(3, np.float32) for name in parts}
    record["0.bad_mean"][1] = np.nan
    entries = {"entries": json.dumps([["k", "a cat", "make it larger"]])}
    save_tensors(tmp_path / "general-00000000.safetensors", record, entries)
    with pytest.raises(InputError, match=rf"general-00000000\.safetensors: 0\.bad_mean {SAID}"):
        open_latents(str(tmp_path)).read("general", 0, Drops(text=False, image=False, reflection=False))
    save_tensors(tmp_path / SHARED, shared | {"empty_text": np.asarray([np.inf], np.float32)})
    with pytest.raises(InputError, match=rf"{SHARED}: empty_text {SAID}"):
        open_latents(str(tmp_path))
