"""Packed folders: smaller, whole again in the cache, and checked."""

import json
import multiprocessing
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rflow_jax.errors import InputError
from rflow_jax.weights import hub
from rflow_jax.weights.packed import MANIFEST, _column, _packed, is_packed, pack_folder, unpacked
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import save_tensors


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A packed folder, with a matrix of each kind, and the cache in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "model" / "net").mkdir(parents=True)
    tensors = {
        "weight": rng.standard_normal((64, 128), np.float32) * np.logspace(-3, 3, 64, dtype=np.float32)[:, None],
        "half": rng.standard_normal((16, 8, 64)).astype(ml_dtypes.bfloat16),
        "bias": rng.standard_normal(5000).astype(np.float32),
        "small": rng.standard_normal((4, 4)).astype(np.float32),
        "ids": np.arange(4096).reshape(2, -1),
        "zero": np.zeros((64, 64), np.float32),
    }
    save_tensors(tmp_path / "model" / "net" / "w.safetensors", tensors, {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    assert pack_folder(tmp_path / "model", tmp_path / "packed", {"recipe": "r"}) > 0
    return tmp_path / "packed", tensors


def test_a_packed_folder_is_whole_again(folder, tmp_path):
    packed, tensors = folder
    assert is_packed(packed)
    assert not is_packed(tmp_path / "model")
    file = TensorFiles.open(unpacked(packed) / "net" / "w.safetensors")
    assert set(file) == set(tensors)
    assert file.metadata == {"format": "pt"}
    for key in ("bias", "small"):
        np.testing.assert_array_equal(file.read(key), tensors[key].astype(ml_dtypes.bfloat16))
        assert file.read(key).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(file.read("ids"), tensors["ids"])
    assert file.read("ids").dtype == tensors["ids"].dtype
    for key in ("weight", "half", "zero"):
        found, wanted = file.read(key).astype(np.float32), tensors[key].astype(np.float32)
        largest = np.abs(wanted).reshape(len(wanted), -1).max(1).reshape(-1, *[1] * (wanted.ndim - 1))
        assert np.all(np.abs(found - wanted) <= largest * (0.5 / 127 + 2**-8))
    assert (unpacked(packed) / "config.json").read_text() == '{"a": 1}'
    small = (packed / "net" / "w.safetensors").stat().st_size
    assert small < 0.65 * (tmp_path / "model" / "net" / "w.safetensors").stat().st_size
    assert json.loads((packed / MANIFEST).read_text())["made"] == {"recipe": "r"}


@given(
    arrays.arrays(np.float32, (64, 64), elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)),
)
def test_the_error_is_half_a_step(value):
    packed = _packed({"w": value})
    back = packed["w"].astype(np.float64) * _column(packed["w::scale"], 2)
    assert np.all(np.abs(back - value) <= 0.501 * packed["w::scale"][:, None])


def test_it_is_unpacked_once(folder):
    packed, _ = folder
    first = unpacked(packed)
    before = (first / "config.json").stat().st_mtime_ns
    (packed / "config.json").write_text("changed behind its back")
    assert unpacked(packed) == first
    assert (first / "config.json").stat().st_mtime_ns == before
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_changed_folder_is_another(folder, tmp_path):
    packed, _ = folder
    (tmp_path / "model" / "config.json").write_text('{"a": 2}')
    pack_folder(tmp_path / "model", tmp_path / "new" / "packed", {})
    assert unpacked(tmp_path / "new" / "packed") != unpacked(packed)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_is_noticed_by_the_sum(folder, damage):
    packed, _ = folder
    file = packed / "net" / "w.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[-100] ^= 1
        file.write_bytes(content[:-7] if damage == "cut" else content)
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: missing or damaged: .*install or copy it again"):
        unpacked(packed)


def test_a_newer_version_is_told(folder):
    packed, _ = folder
    manifest = json.loads((packed / MANIFEST).read_text())
    (packed / MANIFEST).write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(InputError, match="not a packed model of version 1"):
        unpacked(packed)


def test_nothing_is_overwritten(folder, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        pack_folder(tmp_path / "model", folder[0], {})


def test_models_are_found_by_name(folder, monkeypatch):
    packed, _ = folder
    monkeypatch.setattr(hub, "BUNDLED", (packed.parent,))
    assert hub.resolve("packed") == hub.resolve_lora(str(packed)) == hub.resolve_vlm("packed") == unpacked(packed)


def test_a_folder_of_something_else_hides_no_model_that_comes_along(folder, monkeypatch, tmp_path):
    packed, _ = folder
    monkeypatch.setattr(hub, "BUNDLED", (packed.parent,))
    monkeypatch.chdir(tmp_path / "model")
    Path("packed").mkdir()
    Path("packed/seed_0.png").touch()
    assert hub.resolve("packed") == unpacked(packed)
    Path("packed/config.json").write_text("{}")
    assert hub.resolve("packed") == Path("packed")


def test_a_packed_folder_is_not_packed_again(folder, tmp_path):
    with pytest.raises(InputError, match="packed already"):
        pack_folder(folder[0], tmp_path / "again", {})


def test_several_processes_unpack_one_folder(folder):
    packed, _ = folder
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(unpacked, [packed] * 8)
    assert len(set(found)) == 1
    assert len(list(found[0].parent.iterdir())) == 1
