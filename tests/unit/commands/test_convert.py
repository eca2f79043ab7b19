"""Checkpoints to model folders of ours and back into networks; the command line; memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from convert_weights.__main__ import main
from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer, abstract_flux
from rflow_jax.utils.cli import run
from rflow_jax.weights.components import COMPONENTS, TRANSFORMER, VAE, read_schedule
from rflow_jax.weights.convert import Options, convert_flux
from rflow_jax.weights.flux import describe
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import load_into, parameter_shapes, parameter_values
from rflow_jax.weights.mappings.flux import BFL, BFL_PREFIX
from rflow_jax.weights.model_folder import (
    INDEX_FILE,
    MODEL_FILE,
    is_stored,
    load_stored,
    save_safetensors,
    stored_bytes,
)
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import PARTIAL, Conversion, write_safetensors
from tests.kit.encoders import random_model

BFL_TINY = FluxConfig(
    num_layers=2,
    num_single_layers=1,
    attention_head_dim=32,
    num_attention_heads=1,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 14, 14),
)


@pytest.fixture
def model(golden) -> Path:
    return golden / "pipeline"


@pytest.fixture(scope="module")
def single_file(tmp_path_factory) -> Path:
    """A tiny transformer under Black Forest Labs' names."""
    values = {
        path: np.asarray(value) for path, value in parameter_values(random_model(FluxTransformer, BFL_TINY)).items()
    }
    the_plan = plan(BFL, {path: value.shape for path, value in values.items()})
    file = tmp_path_factory.mktemp("bfl") / "flux1-dev.safetensors"
    save_file({key: the_plan.join(key, values) for key in the_plan.entries}, file)
    return file


def assert_same(got, want):
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value), err_msg=path)


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_every_network_is_the_same_as_read_directly(tmp_path, model, storage):
    convert_flux(model, tmp_path / "out", Options(storage=storage))
    found = describe(tmp_path / "out")
    assert found.kind == "converted"
    assert found.info["storage"] == storage
    for component in COMPONENTS:
        folder = found.components[component.folder]
        config = component.read_config(found.path)
        files = TensorFiles.open(model / component.folder)
        want = load_into(component.abstract(config), component.table_for(files, config), files)
        seen = []
        got = load_stored(component.abstract(config), folder, on_bytes=seen.append)
        assert_same(parameter_values(got), parameter_values(want))
        assert is_stored(folder)
        assert sum(seen) == stored_bytes(folder)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        assert sorted(p.name for p in (tmp_path / "out" / name).iterdir()) == sorted(
            p.name for p in (model / name).iterdir()
        )


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_dtype_and_sharding(tmp_path, single_file, storage):
    convert_flux(single_file, tmp_path / "out", Options(storage=storage, dtype=ml_dtypes.bfloat16))
    mesh = jax.make_mesh((8,), ("x",))

    def sharding_for(path, shape):
        spec = jax.P("x") if shape[0] % 8 == 0 else jax.P()
        return jax.sharding.NamedSharding(mesh, spec)

    folder = tmp_path / "out" / "transformer"
    got = load_stored(abstract_flux(BFL_TINY), folder, dtype=jnp.float32, sharding_for=sharding_for)
    kernel = got.double_blocks[0].image.mod.kernel.get_value()
    assert kernel.sharding.spec == jax.P("x")
    want = random_model(FluxTransformer, BFL_TINY)
    assert_same(
        {path: value.astype(jnp.bfloat16) for path, value in parameter_values(got).items()},
        {path: value.astype(jnp.bfloat16) for path, value in parameter_values(want).items()},
    )


def test_a_disk_that_fills_while_orbax_writes_is_an_error_of_the_disk(tmp_path, model, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*out'"):
        convert_flux(model, tmp_path / "out", Options(storage="orbax"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer/config.json", {"num_layers": "2"}, "num_layers is '2'; expected a whole number"),
        ("transformer/config.json", {"num_attention_heads": 2.5}, "expected a whole number"),
        ("transformer/config.json", {"num_attention_heads": 0}, "expected a whole number above 0"),
        ("transformer/config.json", {"guidance_embeds": "yes"}, "guidance_embeds is 'yes'; expected true or false"),
        ("transformer/config.json", {"axes_dims_rope": 16}, "axes_dims_rope is 16; expected a list of whole numbers"),
        ("transformer/config.json", {"axes_dims_rope": [4, None]}, "expected a list of whole numbers"),
        ("text_encoder/config.json", {"hidden_act": None}, "hidden_act is None; expected a text"),
        ("text_encoder_2/config.json", {"d_model": [24]}, r"d_model is \[24\]; expected a whole number"),
        (
            "text_encoder_2/config.json",
            {"layer_norm_epsilon": "1e-6"},
            "layer_norm_epsilon is '1e-6'; expected a number",
        ),
        ("vae/config.json", {"block_out_channels": None}, "block_out_channels is None; expected a list"),
        ("vae/config.json", {"sample_size": [[64]]}, "sample_size is .*; expected a list of whole numbers"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "NaN is no number in JSON"),
        ("scheduler/scheduler_config.json", {"shift": "3"}, "shift is '3'; expected a number"),
        ("scheduler/scheduler_config.json", {"base_image_seq_len": None}, "base_image_seq_len is None"),
    ],
)
def test_a_wrong_type_in_a_configuration_names_file_and_key(tmp_path, model, file, change, message):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    read = {c.folder: c.read_config for c in COMPONENTS} | {"scheduler": read_schedule}
    with pytest.raises(InputError, match=f"{path}: .*{message}"):
        read[path.parent.name](tmp_path / "model")
    path.write_text("[1]")
    with pytest.raises(InputError, match=f"{path}: holds a list; expected an object"):
        read[path.parent.name](tmp_path / "model")


@pytest.mark.parametrize("change", [{"down_block_types": None}, {"up_block_types": 3}])
def test_block_types_that_are_no_list(model, change):
    content = json.loads((model / "vae" / "config.json").read_text()) | change
    with pytest.raises(InputError, match="_block_types must be 4 times"):
        VAE.config_of(content, model)


def test_a_single_file(tmp_path, single_file):
    convert_flux(single_file, tmp_path / "out")
    config = TRANSFORMER.read_config(tmp_path / "out")
    assert config == BFL_TINY
    got = load_stored(abstract_flux(config), tmp_path / "out" / "transformer")
    assert_same(parameter_values(got), parameter_values(random_model(FluxTransformer, BFL_TINY)))


def test_a_single_file_with_text_encoders(tmp_path, single_file, model):
    prefixed = {BFL_PREFIX + key: value for key, value in TensorFiles.open(single_file).stream()}
    (tmp_path / "in").mkdir()
    save_file(prefixed, tmp_path / "in" / "flux1-schnell.safetensors")
    convert_flux(tmp_path / "in", tmp_path / "out", Options(text=model))
    assert set(describe(tmp_path / "out").components) == {"transformer", "text_encoder", "text_encoder_2"}
    assert (tmp_path / "out" / "tokenizer_2" / "tokenizer.json").is_file()
    schedule = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["use_dynamic_shifting"] is True


def test_shards(tmp_path, single_file):
    files = TensorFiles.open(single_file)
    the_plan = plan(BFL, parameter_shapes(abstract_flux(BFL_TINY)))
    save_safetensors(Conversion(the_plan, files), tmp_path, shard_bytes=40_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards == sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == files.nbytes
    got = load_stored(abstract_flux(BFL_TINY), tmp_path)
    assert_same(parameter_values(got), parameter_values(random_model(FluxTransformer, BFL_TINY)))


class TestErrors:
    def test_what_is_no_model(self, tmp_path):
        with pytest.raises(InputError, match="no such file or folder; expected a converted folder"):
            describe(tmp_path / "none")
        with pytest.raises(InputError, match="is not a model: expected a converted folder"):
            describe(tmp_path)
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(InputError, match=r"no transformer/config\.json"):
            describe(tmp_path)
        (tmp_path / MODEL_FILE).write_text('{"format": "other"}')
        with pytest.raises(InputError, match="not written by rflow convert"):
            describe(tmp_path)
        (tmp_path / MODEL_FILE).write_text('{"format": "rflow_jax model", "version": 99}')
        with pytest.raises(InputError, match="format version 99"):
            describe(tmp_path)
        (tmp_path / f"x{PARTIAL}").mkdir()
        with pytest.raises(InputError, match="was interrupted"):
            describe(tmp_path / f"x{PARTIAL}")
        save_file({"a": np.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="is not a FLUX transformer"):
            describe(tmp_path / "x.safetensors")

    def test_nothing_is_written_before_the_checkpoint_is_checked(self, tmp_path, single_file):
        tensors = dict(TensorFiles.open(single_file).stream())
        tensors["more"] = np.zeros(1)
        save_file(tensors, tmp_path / "flux1-dev.safetensors")
        with pytest.raises(InputError, match="more not known"):
            convert_flux(tmp_path / "flux1-dev.safetensors", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["flux1-dev.safetensors"]

    def test_an_interruption_leaves_nothing(self, tmp_path, model):
        def interrupt(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert_flux(model, tmp_path / "out", on_progress=interrupt)
        assert list(tmp_path.iterdir()) == []

    def test_options_that_do_not_belong(self, tmp_path, model, single_file):
        with pytest.raises(InputError, match="leave out ae and text"):
            convert_flux(model, tmp_path / "out", Options(text=model))
        with pytest.raises(InputError, match="has no text_encoder, text_encoder_2"):
            convert_flux(single_file, tmp_path / "out", Options(text=tmp_path))
        convert_flux(single_file, tmp_path / "out")
        with pytest.raises(InputError, match="is a converted model already"):
            convert_flux(tmp_path / "out", tmp_path / "again")
        with pytest.raises(InputError, match="exists already"):
            convert_flux(single_file, tmp_path / "out")

    def test_a_stored_network_of_other_sizes(self, tmp_path, single_file):
        convert_flux(single_file, tmp_path / "out")
        folder = tmp_path / "out" / "transformer"
        with pytest.raises(InputError, match=r"not known to this network, such as double_blocks\.1"):
            load_stored(abstract_flux(FluxConfig(**vars(BFL_TINY) | {"num_layers": 1})), folder)
        with pytest.raises(InputError, match="has shape"):
            load_stored(abstract_flux(FluxConfig(**vars(BFL_TINY) | {"mlp_ratio": 2.0})), folder)


@pytest.mark.parity
def test_pickles(tmp_path, model):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    source = tmp_path / "in"
    shutil.copytree(model / "transformer", source)
    tensors = dict(TensorFiles.open(source).stream())
    (source / "diffusion_pytorch_model.safetensors").unlink()
    for number, keys in enumerate((list(tensors)[:50], list(tensors)[50:])):
        torch.save({key: torch.from_numpy(tensors[key]) for key in keys}, source / f"part-{number}.bin")
    with pytest.raises(InputError, match="--allow_pickle"):
        convert_flux(source, tmp_path / "out")
    convert_flux(source, tmp_path / "out", Options(allow_pickle=True))
    convert_flux(model, tmp_path / "want")
    config = TRANSFORMER.read_config(tmp_path / "out")
    assert_same(
        parameter_values(load_stored(abstract_flux(config), tmp_path / "out" / "transformer")),
        parameter_values(load_stored(abstract_flux(config), tmp_path / "want" / "transformer")),
    )


class TestCommandLine:
    def test_flux(self, tmp_path, single_file, capsys):
        assert main(["flux", str(single_file), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'out'}: converted\n"
        dtypes = {info.dtype for info in TensorFiles.open(tmp_path / "out" / "transformer").values()}
        assert dtypes == {np.dtype(ml_dtypes.bfloat16)}

    def test_lora_in_and_out(self, tmp_path, golden, capsys):
        source = golden / "lora" / "pytorch_lora_weights.safetensors"
        assert main(["lora", str(source), str(tmp_path / "ours"), "--alpha", "2"]) == 0
        assert "rank 4" in capsys.readouterr().out
        assert main(["export-lora", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
        before, after = TensorFiles.open(source), TensorFiles.open(tmp_path / "out")
        assert_same({key: after.read(key) for key in after}, {key: before.read(key) for key in before})
        assert json.loads(after.metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == 2
        assert main(["export-lora", str(tmp_path / "ours"), str(tmp_path / "f"), "--fold-alpha"]) == 0
        key = next(key for key in before if ".lora_B." in key)
        np.testing.assert_array_equal(TensorFiles.open(tmp_path / "f").read(key), before.read(key) / 2)

    @pytest.mark.parametrize(
        "argv", [[], ["flux"], ["flux", "a", "b", "--nonsense"], ["flux", "a", "b", "--format", "x"]]
    )
    def test_a_bad_command_line(self, argv):
        with pytest.raises(InputError):
            main(argv)

    def test_messages_are_in_the_words_of_the_command_line(self, tmp_path):
        for argv, message in (
            (["flux"], "^missing: src, dst$"),
            (["lora", "a", "b", "--alpha", "x"], "^alpha is x: give a number or null$"),
            (["flux", "nowhere", str(tmp_path)], "^nowhere: no such file or folder, and not a Hub id"),
        ):
            with pytest.raises(InputError, match=message):
                main(argv)

    def test_a_folder_below_a_file(self, tmp_path, model, capsys):
        (tmp_path / "file").touch()
        assert run(lambda: main(["flux", str(model), str(tmp_path / "file" / "out")])) == 2
        assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: a file of this name is in the way\n"

    def test_errors_are_one_line(self, tmp_path):
        command = [sys.executable, "-m", "convert_weights", "flux", str(tmp_path / "none"), str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {tmp_path / 'none'}: no such file or folder")
        assert done.stderr.count("\n") == 1


MEASURE = """
import resource, sys
from pathlib import Path
import jax
from rflow_jax.weights.convert import Options, convert_flux
import rflow_jax.weights.orbax_io
jax.devices()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert_flux(Path(sys.argv[1]), Path(sys.argv[2]), Options(storage=sys.argv[3]))
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory) -> Iterator[Path]:
    """A single file of 1.3 GB, gone after the tests."""
    config = FluxConfig(num_layers=6, num_single_layers=12, num_attention_heads=10)
    the_plan = plan(BFL, parameter_shapes(abstract_flux(config)))
    block = np.random.default_rng(0).standard_normal(2**22).astype(ml_dtypes.bfloat16)
    infos = {key: (block.dtype, the_plan.their_shape(key)) for key in the_plan.entries}
    folder = tmp_path_factory.mktemp("large")
    tensors = ((key, np.resize(block, shape)) for key, (_, shape) in infos.items())
    write_safetensors(folder / "flux1-dev.safetensors", infos, tensors)
    yield folder / "flux1-dev.safetensors"
    shutil.rmtree(folder)


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, large_file, storage):
    """What the process takes more is a bounded window, well below the checkpoint."""
    size, out = large_file.stat().st_size, tmp_path / "out"
    command = [sys.executable, "-c", MEASURE, str(large_file), str(out), storage]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) >= size
    shutil.rmtree(out)
    grown = int(done.stdout)
    print(f"{storage}: {grown / 1e9:.2f} GB more resident for a checkpoint of {size / 1e9:.2f} GB")
    assert size > 1.2e9
    assert grown < 0.75e9
