"""Checkpoints to model folders of ours and back into networks; the command line; memory."""

from __future__ import annotations

import json
import os
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
from rflow_jax.models.text_encoders import ClipTextConfig, ClipTextEncoder, T5Config, T5Encoder
from rflow_jax.utils.cli import run
from rflow_jax.weights.components import CLIP, COMPONENTS, T5, TRANSFORMER, VAE, read_schedule
from rflow_jax.weights.convert import Options, convert_flux
from rflow_jax.weights.flux import describe, load_flux
from rflow_jax.weights.key_mapping import plan
from rflow_jax.weights.loading import load_into, parameter_shapes, parameter_values
from rflow_jax.weights.mappings import text_encoders
from rflow_jax.weights.mappings.flux import BFL, BFL_PREFIX
from rflow_jax.weights.mappings.text_encoders import CLIP_TEXT, T5_UNSHARED, clip_sizes
from rflow_jax.weights.model_folder import (
    INDEX_FILE,
    MODEL_FILE,
    is_stored,
    load_stored,
    save_safetensors,
    stored_bytes,
)
from rflow_jax.weights.published import DEV
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import PARTIAL, Conversion, save_tensors, write_safetensors
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


def test_a_single_file_in_scaled_float8(tmp_path, single_file):
    """As ComfyUI's are named; the numbers are those of the same file in bfloat16."""
    scaled, plain = {f"{BFL_PREFIX}scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, {}
    for key, value in TensorFiles.open(single_file).stream():
        name, scale = BFL_PREFIX + key, np.float32(np.abs(value).max() / 448)
        if value.ndim == 2:
            scaled |= {
                name: (value / scale).astype(ml_dtypes.float8_e4m3fn),
                name.replace("weight", "scale_weight"): scale,
            }
            plain[key] = (scaled[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
        else:
            scaled[name] = plain[key] = value
    for folder, tensors in (("scaled", scaled), ("plain", plain)):
        save_tensors(tmp_path / f"{folder}.safetensors", {key: np.asarray(value) for key, value in tensors.items()})
        convert_flux(tmp_path / f"{folder}.safetensors", tmp_path / folder)
    got, want = (
        parameter_values(load_stored(abstract_flux(BFL_TINY), tmp_path / folder / "transformer"))
        for folder in ("scaled", "plain")
    )
    assert_same(got, want)


def test_a_single_file_with_text_encoders(tmp_path, single_file, model):
    prefixed = {BFL_PREFIX + key: value for key, value in TensorFiles.open(single_file).stream()}
    (tmp_path / "in").mkdir()
    save_file(prefixed, tmp_path / "in" / "flux1-schnell.safetensors")
    convert_flux(tmp_path / "in", tmp_path / "out", Options(text=[model]))
    assert set(describe(tmp_path / "out").components) == {"transformer", "text_encoder", "text_encoder_2"}
    assert (tmp_path / "out" / "tokenizer_2" / "tokenizer.json").is_file()
    schedule = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["use_dynamic_shifting"] is True


@pytest.fixture(scope="module")
def text_files(tmp_path_factory) -> dict[str, Path]:
    """CLIP and T5 as ComfyUI publishes them, of sizes that suit :func:`single_file`, and the whole CLIP around one."""
    folder = tmp_path_factory.mktemp("text")
    clip = ClipTextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        vocab_size=50,
        max_position_embeddings=9,
    )
    t5 = T5Config(vocab_size=40, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    made = {"clip_l": (ClipTextEncoder, clip, CLIP_TEXT, {}), "t5xxl_fp16": (T5Encoder, t5, text_encoders.T5, {})}
    made["clip_whole"] = (ClipTextEncoder, clip, CLIP_TEXT, {"logit_scale": np.ones(()), "vision_model.x": np.ones(2)})
    made["t5xxl_unshared"] = (T5Encoder, t5, T5_UNSHARED, {})
    files = {}
    for name, (network, config, table, more) in made.items():
        values = {
            path: np.asarray(v)
            for path, v in parameter_values(random_model(network, config, dtype=jnp.float16)).items()
        }
        the_plan = plan(table, {path: value.shape for path, value in values.items()})
        tensors = {key: the_plan.join(key, values) for key in the_plan.entries}
        files[name] = folder / f"{name}.safetensors"
        save_file(tensors | more, files[name])
    return files


class TestTextEncodersAsFiles:
    @pytest.fixture(scope="class")
    def single(self, tmp_path_factory) -> Path:
        """A transformer for these text encoders."""
        config = FluxConfig(**vars(BFL_TINY) | {"pooled_projection_dim": 64})
        values = {p: np.asarray(v) for p, v in parameter_values(random_model(FluxTransformer, config)).items()}
        the_plan = plan(BFL, {path: value.shape for path, value in values.items()})
        file = tmp_path_factory.mktemp("bfl") / "flux1-dev.safetensors"
        save_file({key: the_plan.join(key, values) for key in the_plan.entries}, file)
        return file

    @pytest.mark.parametrize("names", [("clip_l", "t5xxl_fp16"), ("t5xxl_unshared", "clip_whole")])
    def test_in_any_order(self, tmp_path, single, text_files, names, capsys):
        paths = [str(text_files[name]) for name in names]
        assert main(["flux", "--text", *paths, str(single), str(tmp_path / "out")]) == 0
        done = capsys.readouterr()
        assert done.out == f"{tmp_path / 'out'}: converted\n"
        assert "has no tokenizer and no tokenizer_2: before generating, copy these folders" in done.err
        for component, network in ((CLIP, ClipTextEncoder), (T5, T5Encoder)):
            config = component.read_config(tmp_path / "out")
            got = load_stored(component.abstract(config), tmp_path / "out" / component.folder)
            want = random_model(network, config, dtype=jnp.float16)
            assert_same(parameter_values(got), parameter_values(want))
        config = json.loads((tmp_path / "out" / "text_encoder_2" / "config.json").read_text())
        assert (config["num_heads"], config["relative_attention_num_buckets"], config["d_ff"]) == (2, 32, 32)

    def test_with_a_folder_of_tokenizers(self, tmp_path, single, text_files, model, capsys):
        """The folder's own networks are not taken, though its configurations would be."""
        shutil.copytree(model, tmp_path / "folder", ignore=shutil.ignore_patterns("config.json"))
        paths = [text_files["t5xxl_fp16"], tmp_path / "folder", text_files["clip_l"]]
        assert main(["flux", str(single), str(tmp_path / "out"), "--text", *map(str, paths)]) == 0
        assert "has no" not in capsys.readouterr().err
        assert (tmp_path / "out" / "tokenizer_2" / "tokenizer.json").is_file()
        assert T5.read_config(tmp_path / "out").d_model == 24

    def test_the_configuration_beside_a_file(self, tmp_path, single, text_files):
        shutil.copy(text_files["clip_l"], tmp_path / "model.safetensors")
        config = DEV["text_encoder"] | vars(
            CLIP.config_of(clip_sizes(TensorFiles.open(text_files["clip_l"]).shapes, ""), tmp_path)
        )
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
        text = [tmp_path / "model.safetensors", text_files["t5xxl_fp16"]]
        convert_flux(single, tmp_path / "out", Options(text=text))
        assert CLIP.read_config(tmp_path / "out").num_attention_heads == 4

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["clip_l"], r"clip_l\.safetensors: has no text_encoder_2"),
            (["clip_l", "clip_whole", "t5xxl_fp16"], r"clip_whole\.safetensors: a CLIP text model, as .*clip_l"),
            (["clip_l", "flux1-dev"], r"flux1-dev\.safetensors: neither CLIP's text model nor T5's encoder"),
            (["nowhere", "clip_l"], "nowhere: no such file or folder"),
            (
                ["clip_wide", "t5xxl_fp16"],
                r"clip_wide\.safetensors: a CLIP text model of width 128; this .* takes one of 64",
            ),
            (
                ["clip_odd", "t5xxl_fp16"],
                r"clip_odd\.safetensors: a CLIP of width 40, whose number of heads is not known",
            ),
            (["t5_old", "clip_l"], r"t5_old\.safetensors: has no matrix .*wi_0\.weight; is it a T5 encoder"),
        ],
    )
    def test_what_does_not_suit(self, tmp_path, single, text_files, names, message):
        def other(name, files, change):
            tensors = {change(key): value for key, value in TensorFiles.open(files).stream()}
            save_file(tensors, tmp_path / f"{name}.safetensors")
            return tmp_path / f"{name}.safetensors"

        known = text_files | {"flux1-dev": single, "nowhere": tmp_path / "nowhere"}
        known["t5_old"] = other("t5_old", text_files["t5xxl_fp16"], lambda key: key.replace("wi_0", "wi"))
        for name, width in (("clip_wide", 128), ("clip_odd", 40)):
            known[name] = tmp_path / f"{name}.safetensors"
            files = TensorFiles.open(text_files["clip_l"])
            shapes = {
                key: tuple(width if size == 64 else size for size in shape) for key, shape in files.shapes.items()
            }
            save_file({key: np.zeros(shape, np.float16) for key, shape in shapes.items()}, known[name])
        with pytest.raises(InputError, match=message):
            convert_flux(single, tmp_path / "out", Options(text=[known[name] for name in names]))
        assert not (tmp_path / "out").exists()


def test_a_pointer_among_the_tokenizers(tmp_path, model):
    shutil.copytree(model, tmp_path / "in")
    file = tmp_path / "in" / "tokenizer_2" / "tokenizer.json"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    for read in (
        lambda: convert_flux(tmp_path / "in", tmp_path / "out"),
        lambda: load_flux(str(tmp_path / "in"), lora=None, lora_alpha=None, dtype="float32", progress=False),
    ):
        with pytest.raises(InputError, match=rf"{file}: a Git LFS pointer, not the file itself"):
            read()
    assert not (tmp_path / "out").exists()


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

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"img_in.weight": (0, 64)}, r"img_in\.weight has the shape \[0, 64\], so it holds nothing"),
            ({"double_blocks.0.img_attn.norm.query_norm.scale": (0,)}, r"query_norm\.scale has the shape \[0\]"),
            ({"img_in.weight": (64,)}, "not a FLUX transformer of Black Forest Labs"),
            ({"double_blocks.999999999.img_attn.qkv.weight": (1, 1)}, r"double_blocks\.2 is missing"),
            ({"single_blocks.x.linear1.weight": (1, 1)}, "not a FLUX transformer of Black Forest Labs"),
        ],
    )
    def test_tensors_that_give_no_sizes(self, tmp_path, single_file, change, message):
        tensors = dict(TensorFiles.open(single_file).stream())
        save_file(tensors | {key: np.ones(shape) for key, shape in change.items()}, tmp_path / "flux1-dev.safetensors")
        with pytest.raises(InputError, match=rf"flux1-dev\.safetensors: .*{message}"):
            convert_flux(tmp_path / "flux1-dev.safetensors", tmp_path / "out")

    def test_a_pipe_is_not_waited_for(self, tmp_path, single_file):
        os.mkfifo(tmp_path / "pipe")
        for options in (Options(ae=tmp_path / "pipe"), Options(text=[tmp_path / "pipe"])):
            with pytest.raises(InputError, match="pipe: no such file or folder"):
                convert_flux(single_file, tmp_path / "out", options)

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
            convert_flux(model, tmp_path / "out", Options(text=[model]))
        with pytest.raises(InputError, match="has no text_encoder, text_encoder_2"):
            convert_flux(single_file, tmp_path / "out", Options(text=[tmp_path]))
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
        error = capsys.readouterr().err
        assert error.startswith(
            f"error: {tmp_path / 'file'}: a file, a pipe, a device or a broken link is in the place"
        )
        assert error.count("\n") == 1

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
