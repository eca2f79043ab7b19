"""The kit's folder is the one that diffusers and transformers would write."""

from __future__ import annotations

import pytest

from rflow_jax.testing import flux_layout as layout
from rflow_jax.testing import make_flux as kit

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.parity

SIZES = ["dev", "schnell", "tiny"]


def shapes_of(model) -> layout.Shapes:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("size", SIZES)
def test_transformer(size):
    config = layout.configs(size)["transformer"]
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(config)
    assert layout.transformer_shapes(config) == shapes_of(model)
    if size == "dev":
        assert sum(parameter.numel() for parameter in model.parameters()) == 11_901_408_320


@pytest.mark.parametrize("size", SIZES)
def test_autoencoder(size):
    config = layout.configs(size)["vae"]
    with torch.device("meta"):
        model = diffusers.AutoencoderKL.from_config(config)
    assert layout.vae_shapes(config) == shapes_of(model)


@pytest.mark.parametrize("size", SIZES)
def test_clip(size):
    config = layout.configs(size)["text_encoder"]
    with torch.device("meta"):
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    assert layout.clip_shapes(config) == shapes_of(model)


@pytest.mark.parametrize("size", SIZES)
def test_t5(size):
    config = layout.configs(size)["text_encoder_2"]
    with torch.device("meta"):
        model = transformers.T5EncoderModel(transformers.T5Config(**config))
    shapes = shapes_of(model)
    assert shapes.pop("encoder.embed_tokens.weight") == shapes["shared.weight"]  # tied, and not stored
    assert layout.t5_shapes(config) == shapes


@pytest.mark.parametrize("size", ["dev", "tiny"])
def test_lora_fits_the_transformer(size):
    """peft, given the kit's modules, makes matrices of the kit's shapes."""
    config = layout.configs(size)["transformer"]
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel.from_config(config)
        model.add_adapter(peft.LoraConfig(r=4, target_modules=layout.lora_modules(config)))
        state = peft.get_peft_model_state_dict(model)
    shapes = {f"transformer.{key}": tuple(value.shape) for key, value in state.items()}
    assert shapes == layout.lora_shapes(config, 4)


@pytest.mark.parametrize("shard_gb", [10, 0.0002])
def test_tiny_folder_makes_an_image_in_diffusers(tmp_path, shard_gb):
    kit.make(tmp_path / "tiny", size="tiny", shard_gb=shard_gb, lora_rank=4)
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "tiny", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    base = sample(pipe)
    pipe.load_lora_weights(tmp_path / "tiny" / "lora", weight_name="pytorch_lora_weights.safetensors")
    corrected = sample(pipe)
    assert base.isfinite().all()
    assert base.std() > 0.01
    assert not torch.allclose(base, corrected, atol=1e-3)


def sample(pipe):
    seed = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
    return pipe("a red dog", generator=seed, output_type="pt", **size).images
