"""The kit that writes a FLUX folder: sizes, files and numbers of the real layout."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from rflow_jax.errors import InputError
from rflow_jax.testing import flux_layout as layout
from rflow_jax.testing import make_flux as kit
from rflow_jax.weights.safetensors_io import TensorFiles


def parameters(shapes: layout.Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(("size", "count"), [("dev", 11_901_408_320), ("schnell", 11_891_178_560)])
def test_transformer_has_the_published_number_of_parameters(size, count):
    assert parameters(layout.transformer_shapes(layout.configs(size)["transformer"])) == count


def test_other_parts_have_the_published_numbers_of_parameters():
    config = layout.configs("dev")
    assert parameters(layout.t5_shapes(config["text_encoder_2"])) == 4_762_310_656
    assert parameters(layout.clip_shapes(config["text_encoder"])) == 123_060_480
    assert parameters(layout.vae_shapes(config["vae"])) == 83_819_683


def test_corrector_lora_is_343_pairs():
    config = layout.configs("dev")["transformer"]
    assert len(layout.lora_modules(config)) == 343
    shapes = layout.lora_shapes(config, 32)
    assert len(shapes) == 686
    assert shapes["transformer.single_transformer_blocks.0.proj_out.lora_A.weight"] == (32, 15360)
    assert 4 * parameters(shapes) == pytest.approx(464e6, rel=2e-3)  # the published file's size


def test_lora_keys_are_those_of_the_recordings(golden):
    recorded = json.loads((golden / "golden" / "lora_keys.json").read_text())
    assert sorted(recorded) == sorted(layout.lora_shapes(layout.configs("tiny")["transformer"], 4))


@pytest.mark.parametrize(
    ("part", "shapes"),
    [
        ("transformer", layout.transformer_shapes),
        ("text_encoder", layout.clip_shapes),
        ("text_encoder_2", layout.t5_shapes),
        ("vae", layout.vae_shapes),
    ],
)
def test_shapes_follow_from_a_recorded_configuration(golden, part, shapes):
    folder = golden / "pipeline" / part
    config = json.loads((folder / "config.json").read_text())
    assert shapes(config) == TensorFiles.open(folder).shapes


def test_dev_is_cut_as_on_the_hub(tmp_path):
    files = kit.plan_files(tmp_path, size="dev", shard_gb=10, lora_rank=32)
    names = [str(file.path.relative_to(tmp_path)) for file in files]
    assert names == [
        *(f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "text_encoder/model.safetensors",
        *(f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        "vae/diffusion_pytorch_model.safetensors",
        "lora/pytorch_lora_weights.safetensors",
    ]
    assert max(file.nbytes for file in files) <= 10e9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    dst = tmp_path_factory.mktemp("flux") / "tiny"
    kit.make(dst, size="tiny", shard_gb=0.0002, lora_rank=4)
    return dst


def test_every_part_reads_back_in_its_shapes(tiny):
    config = layout.configs("tiny")
    assert TensorFiles.open(tiny / "transformer").shapes == layout.transformer_shapes(config["transformer"])
    assert TensorFiles.open(tiny / "text_encoder_2").shapes == layout.t5_shapes(config["text_encoder_2"])
    assert TensorFiles.open(tiny / "lora").shapes == layout.lora_shapes(config["transformer"], 4)


def test_index_names_every_tensor_once(tiny):
    index = json.loads((tiny / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = TensorFiles.open(tiny / "transformer")
    assert len(files.files) > 1
    assert index["weight_map"] == {key: info.file.name for key, info in files.items()}
    assert index["metadata"]["total_size"] == files.nbytes


def test_numbers_have_the_spread_that_was_asked_for(tiny):
    files = TensorFiles.open(tiny / "transformer")
    key = "single_transformer_blocks.0.proj_out.weight"
    weight = files.read(key)
    assert weight.dtype == ml_dtypes.bfloat16
    want = 2.0 ** -kit.log2_inverse_std(key, weight.shape)
    assert weight.astype(np.float32).std() == pytest.approx(want, rel=0.05)
    scale = files.read("transformer_blocks.0.attn.norm_q.weight").astype(np.float32)
    assert np.all(np.abs(scale - 1) < 0.2)


def test_lora_is_float32_proper_and_not_zero(tiny):
    files = TensorFiles.open(tiny / "lora")
    values = np.concatenate([files.read(key).ravel() for key in files])
    assert values.dtype == np.float32
    assert np.all(values != 0)
    rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.any(values != rounded)  # a reader that goes through bfloat16 would show


def test_same_seed_same_bytes_other_seed_other_bytes(tiny, tmp_path):
    def weight(folder):
        return TensorFiles.open(folder / "vae").read("decoder.conv_in.weight").tobytes()

    kit.make(tmp_path / "same", size="tiny", lora_rank=4)
    kit.make(tmp_path / "other", size="tiny", lora_rank=4, seed=1)
    assert weight(tmp_path / "same") == weight(tiny)
    assert weight(tmp_path / "other") != weight(tiny)


def test_a_tensor_larger_than_the_block_goes_round_it():
    noise = kit.Noise(0)
    count = kit.WIDE_BLOCK + 10
    values = np.concatenate([chunk.copy() for chunk in noise.chunks("x.weight", (count, 1), "F32")])
    assert values.size == count
    np.testing.assert_array_equal(values[:10], values[-10:])


def test_a_full_folder_is_left_alone(tiny, capsys):
    assert kit.main([str(tiny), "--size", "tiny"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_cut_file_is_noticed_by_the_reader(tiny, tmp_path):
    whole = (tiny / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[:-2])
    with pytest.raises(InputError, match="cut short"):
        TensorFiles.open(cut)
