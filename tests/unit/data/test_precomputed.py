"""Latents and embeddings kept in files: training sees what it sees with the encoders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rflow_jax.data.config import DataConfig
from rflow_jax.data.sources.latents import COMPLETE, LatentEntry, PrecomputeConfig, open_latents
from rflow_jax.data.sources.open import open_loader
from rflow_jax.data.sources.tar import open_tars
from rflow_jax.data.workers import Workers
from rflow_jax.errors import InputError, RunError
from rflow_jax.parallel.mesh import MeshConfig, make_mesh
from rflow_jax.parallel.runtime import reproducible
from rflow_jax.precompute.precompute import Encoded, Job, _split_batch, ahead, precompute
from rflow_jax.precompute.prepare import Prepared
from rflow_jax.testing.make_genref import make_genref
from rflow_jax.training.corrector.latents import make_encode_latents, put_latents, require_latents_of
from rflow_jax.training.corrector.step import StepSpec, TokenShape, make_encode
from rflow_jax.training.prefetch import put_pixels
from rflow_jax.weights.flux import FluxModel, load_flux
from tests.kit.genref_tars import flat, keys_of, tar_bytes

MODEL = str(Path(__file__).parents[2] / "golden" / "pipeline")
LENGTH, BATCH = 12, 4


class Made:
    """Shards, and what the tiny model's encoders make of them."""

    def __init__(self, root: Path):
        self.root = root
        make_genref(root / "shards", shards=1, samples=12, size=40)
        # One of them cannot be decoded; others have no reflection.
        files = [
            (name, {"9_0001.good_image.jpg": b"no picture", "9_0002.reflection.txt": b" no "}.get(name[2:], content))
            for name, content in flat(keys_of(9, 8))
        ]
        (root / "shards" / "009.tar").write_bytes(tar_bytes(files))
        self.tars = DataConfig(
            str(root / "shards"),
            target_size=32,
            condition_size=16,
            crop="center",
            cache=str(root / "index"),
            workers=0,
            drop_image_prob=0.3,
            drop_text_prob=0.2,
        )
        self.config = PrecomputeConfig(MODEL, str(root / "out"), self.tars, "float32", 4, LENGTH)
        self.latents = replace(self.tars, path=self.config.out, format="precomputed")
        precompute(self.config, show=False)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Eight fake ones on a few cores would only cost time; the step's tests have meshes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: MESH)
        yield


@pytest.fixture(scope="module")
def made(one_device, tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("precomputed"))


@pytest.fixture(scope="module")
def bundle() -> FluxModel:
    return load_flux(MODEL, lora=None, lora_alpha=None, dtype="float32", mesh=make_mesh(MeshConfig(), MESH))


MESH = jax.devices()[:1]
RECIPE = StepSpec(5, jnp.float32, TokenShape(LENGTH, (2, 2), (1, 1)))


def batches(config: DataConfig, count: int, start: int = 0, position=None) -> list:
    slots = range(BATCH)
    with open_loader(config, seed=5, batch_size=BATCH, slots=slots, start=start, position=position) as loader:
        return list(islice(loader, count))


def test_training_batches_are_those_of_the_shards(made, bundle):
    mesh = make_mesh(MeshConfig(), MESH)
    encode, encode_latents = make_encode(bundle, RECIPE, mesh), make_encode_latents(bundle, RECIPE, mesh)
    put, put_kept = put_pixels(bundle, LENGTH, mesh), put_latents(mesh)
    texts: set[bool] = set()
    for theirs, ours in zip(batches(made.tars, 8), batches(made.latents, 8), strict=True):
        for name in ("step", "prompts", "t5_texts", "subsets", "skipped"):
            assert getattr(theirs, name) == getattr(ours, name)
        with reproducible(jnp.float32):
            expected = encode(bundle.weights, put(theirs))
            inputs = put_kept(ours)
            with jax.transfer_guard("disallow"):
                found = encode_latents({}, inputs)
        for a, b in zip(expected, found, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(b, a, atol=1e-6, rtol=1e-6)
        texts |= {text == "" for text in theirs.t5_texts}
    assert texts == {True, False}


def test_a_run_goes_on_where_it_stood_and_two_processes_see_what_one_sees(made):
    whole = batches(made.latents, 5)
    with open_loader(made.latents, seed=5, batch_size=BATCH, slots=range(BATCH)) as loader:
        position = json.loads(json.dumps(loader.position(3)))
    assert position == open_loader(made.tars, seed=5, batch_size=BATCH, slots=range(BATCH)).position(3)
    later = batches(made.latents, 2, start=3, position=position)
    assert [batch.digest for batch in later] == [batch.digest for batch in whole[3:]]
    np.testing.assert_array_equal(later[0].latents.text, whole[3].latents.text)
    with open_loader(made.latents, seed=5, batch_size=BATCH, slots=[2, 3]) as loader:
        half = next(iter(loader))
    np.testing.assert_array_equal(half.latents.good[0], whole[0].latents.good[0][2:])


def test_an_interrupted_command_goes_on(made, tmp_path, monkeypatch):
    monkeypatch.setattr("rflow_jax.data.sources.latents.RECORDS_IN_FILE", 3)
    config = replace(made.config, out=str(tmp_path / "out"))
    precompute(config, show=False)
    out = Path(config.out)
    with pytest.raises(InputError, match="all is encoded already"):
        precompute(config, show=False)
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / COMPLETE).unlink()
    (out / "rule-00000003.safetensors").unlink()
    with pytest.raises(InputError, match="not all records are encoded yet"):
        open_latents(config.out)
    with pytest.raises(InputError, match="text_length 12, not 10"):
        precompute(replace(config, max_sequence_length=10), show=False)
    precompute(config, show=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
    source = open_tars(str(made.tars.path), cache=Path(made.root / "index"), show=False)
    found = open_latents(config.out)
    for subset, count in source.counts.items():
        assert found.counts[subset] == count
        for index in range(count):
            entry = found.entry(subset, index)
            assert entry.trouble or entry.prompt == source.read(subset, index).prompt


def test_what_does_not_fit_is_refused(made, bundle, tmp_path):
    assert require_latents_of(made.config.out, bundle, RECIPE).model == MODEL
    with pytest.raises(InputError, match="made with dtype float32, not bfloat16"):
        require_latents_of(made.config.out, bundle, replace(RECIPE, dtype=jnp.bfloat16))
    with pytest.raises(InputError, match="made with text_length 12, not 16"):
        require_latents_of(made.config.out, bundle, replace(RECIPE, shape=TokenShape(16, (2, 2), (1, 1))))
    other = replace(bundle, weights=bundle.weights | {"vae": jax.tree.map(lambda x: x + 1, bundle.weights["vae"])})
    with pytest.raises(InputError, match="made with identity"):
        require_latents_of(made.config.out, other, RECIPE)
    with pytest.raises(InputError, match="made with target_size 32, not 64"):
        batches(replace(made.latents, target_size=64), 1)
    with pytest.raises(InputError, match="made with crop center, not random"):
        batches(replace(made.latents, crop="random"), 1)
    with pytest.raises(InputError, match=r"settings\.json: cannot be read"):
        open_latents(str(tmp_path))


def test_a_crop_that_is_drawn_needs_square_pictures(made, tmp_path):
    from PIL import Image

    config = replace(made.config, data=replace(made.tars, crop="random"), out=str(tmp_path / "square"))
    assert sum(precompute(config, show=False).values()) == 20
    Image.new("RGB", (40, 32)).save(tmp_path / "wide.jpg")
    files = [
        (name, (tmp_path / "wide.jpg").read_bytes() if "image" in name else content)
        for name, content in flat(keys_of(0, 4))
    ]
    (tmp_path / "wide.tar").write_bytes(tar_bytes(files))
    wide = replace(config, data=replace(config.data, path=str(tmp_path / "wide.tar")), out=str(tmp_path / "wide"))
    with pytest.raises(InputError, match=r"40 x 32 pixels .* set data.crop to center"):
        precompute(wide, show=False)


def dies(job):
    os._exit(1)


def test_a_dead_worker_is_an_error():
    with Workers(dies, 1) as workers, pytest.raises(RunError, match="give the same command again"):
        list(ahead(workers, [Job("rule", i) for i in range(50)], 3))


def test_workers_do_not_import_jax():
    script = "import sys; import rflow_jax.precompute.prepare; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])


def test_the_command_says_what_is_missing():
    command = [sys.executable, "-m", "rflow_jax.commands.main", "data", "precompute", "--data.path", "nowhere", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "model" in done.stderr


def test_a_record_that_becomes_no_number_is_one_that_cannot_be_used():
    def ones(*shape: int) -> Any:
        return np.ones(shape, np.float32)

    good, bad = ((ones(3, side, side, 4), ones(3, side, side, 4)) for side in (2, 1))
    encoded = Encoded(good, bad, ones(3, 5), ones(3, 2, 6, 7))
    bad[1][1, 0, 0, 2] = np.inf
    np.asarray(encoded.text)[2, 0, 5, 6] = np.nan  # with the reflection, which this record has not
    entries = [LatentEntry(f"k{number}", "a cat", "make it larger" * (number < 2)) for number in range(3)]
    (first, sound), (second, none), (third, _) = _split_batch([Prepared(entry) for entry in entries], encoded)
    assert (first, third) == (entries[0], entries[2])
    assert "text_with_reflection" in sound
    assert second == LatentEntry("", "", "", "k1: its bad_logvar is NaN or infinite")
    assert none == {}
