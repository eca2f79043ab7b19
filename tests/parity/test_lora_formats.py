"""LoRA files of every format against diffusers' own converters and loaders."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the parity extra is not installed")
pytest.importorskip("diffusers", reason="the parity extra is not installed")
pytest.importorskip("peft", reason="the parity extra is not installed")

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from rflow_jax.flow import image_ids, rope_for, text_ids
from rflow_jax.models.flux.config import ConditionFlags, FluxConfig
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.models.lora import Adapter, attach, linear_shapes
from rflow_jax.weights.loading import load_into
from rflow_jax.weights.lora.export import export_lora
from rflow_jax.weights.lora.read import parts_of, read_lora
from rflow_jax.weights.mappings.flux import BFL, DIFFUSERS
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import save_tensors
from tests.kit.lora import TINY, effect, keyed, module_shapes, random_lora

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def dev_modules() -> dict[str, tuple[int, int]]:
    """Linears of FLUX.1-dev under Black Forest Labs' names; diffusers' converters know only its widths."""
    return module_shapes(BFL, FluxConfig(num_layers=2, num_single_layers=2))


def all_blocks(modules: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The linears of as many blocks as FLUX.1-dev has."""
    counts = {"double_blocks.0.": FluxConfig().num_layers, "single_blocks.0.": FluxConfig().num_single_layers}
    return {
        module.replace(prefix, prefix.replace("0", str(number))): shape
        for module, shape in modules.items()
        for prefix, count in counts.items()
        if module.startswith(prefix)
        for number in range(count)
    }


def theirs(tensors: dict[str, np.ndarray]) -> dict[str, Adapter]:
    """What diffusers makes of a file: our path -> adapter. Alphas are folded in by its converters."""
    state = FluxPipeline.lora_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    # Its kohya converter leaves the prefix away outside the blocks.
    modules = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in state}
    state = {key.removeprefix("transformer."): value.numpy() for key, value in state.items()}
    by_module = {m: Adapter(state[f"{m}.lora_A.weight"], state[f"{m}.lora_B.weight"]) for m in modules}
    return {parts_of(module)[0].path: adapter for module, adapter in by_module.items()}


def assert_same(ours: dict[str, Adapter], reference: dict[str, Adapter]) -> None:
    assert ours.keys() == reference.keys()
    for path, adapter in ours.items():
        want = effect(reference[path])
        np.testing.assert_allclose(effect(adapter), want, rtol=1e-5, atol=1e-5 * abs(want).max(), err_msg=path)


def written(tmp_path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    save_tensors(tmp_path / "lora.safetensors", tensors, metadata)
    return tmp_path / "lora.safetensors"


def test_kohya(tmp_path, dev_modules):
    lora = random_lora(dev_modules, rank=1)
    tensors = keyed(lora, prefix="lora_unet_", a="lora_down.weight", b="lora_up.weight", alpha=0.5, flat=True)
    # diffusers drops the alphas of the final layer, so those are left at the rank.
    for name in ("final_layer_linear", "final_layer_adaLN_modulation_1"):
        del tensors[f"lora_unet_{name}.alpha"]
    assert_same(read_lora(written(tmp_path, tensors)).adapters, theirs(dict(tensors)))


def test_kohya_under_the_names_of_comfy(tmp_path, dev_modules):
    tensors = keyed(
        random_lora(dev_modules, rank=1),
        prefix="diffusion_model.",
        a="lora_down.weight",
        b="lora_up.weight",
    )
    assert_same(read_lora(written(tmp_path, tensors)).adapters, theirs(dict(tensors)))


def test_kohya_under_the_names_of_diffusers(tmp_path):
    # Only what diffusers' converter knows: without the feed-forward and modulations inside the blocks.
    modules = {
        module: shape
        for module, shape in module_shapes(DIFFUSERS).items()
        if "blocks." not in module or ".attn." in module
    }
    tensors = keyed(
        random_lora(modules),
        prefix="lora_transformer_",
        a="lora_down.weight",
        b="lora_up.weight",
        alpha=3.0,
        flat=True,
    )
    assert_same(read_lora(written(tmp_path, tensors)).adapters, theirs(dict(tensors)))


def test_xlabs(tmp_path, dev_modules):
    """All that diffusers' converter knows; it takes a file for XLabs' by the word ``processor``."""
    shapes = {
        f"double_blocks.0.processor.{name}_lora{number}": dev_modules[f"double_blocks.0.{stream}_attn.{name}"]
        for number, stream in ((1, "img"), (2, "txt"))
        for name in ("qkv", "proj")
    }
    width = dev_modules["single_blocks.0.linear1"][0]
    shapes["single_blocks.0.processor.qkv_lora"] = (width, 3 * width)
    shapes["single_blocks.0.processor.proj_lora"] = dev_modules["single_blocks.0.linear2"]
    tensors = keyed(random_lora(shapes, rank=1), a="down.weight", b="up.weight")
    assert_same(read_lora(written(tmp_path, tensors)).adapters, theirs(dict(tensors)))


def test_bfl_layout(tmp_path, dev_modules):
    # diffusers' converter wants all blocks, and of the rest the last layer alone.
    modules = all_blocks(dev_modules) | {"final_layer.linear": dev_modules["final_layer.linear"]}
    tensors = keyed(random_lora(modules, rank=1), prefix="base_model.model.")
    reference = theirs(dict(tensors))
    assert_same(read_lora(written(tmp_path, tensors)).adapters, reference)
    plain = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    (tmp_path / "plain").mkdir()
    assert_same(read_lora(written(tmp_path / "plain", plain)).adapters, reference)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[FluxTransformer2DModel, Path]:
    torch.manual_seed(0)
    config = {key: getattr(TINY, key) for key in TINY.__dataclass_fields__ if key not in ("mlp_ratio", "rope_theta")}
    model = FluxTransformer2DModel(**config).eval()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, folder


def pipeline(model: FluxTransformer2DModel) -> FluxPipeline:
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)


def their_output(model: FluxTransformer2DModel) -> np.ndarray:
    latents, text, pooled, t, guidance = inputs()
    with torch.no_grad():
        return model(
            hidden_states=torch.from_numpy(latents),
            encoder_hidden_states=torch.from_numpy(text),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(t),
            img_ids=torch.from_numpy(image_ids(2, 3)),
            txt_ids=torch.from_numpy(text_ids(text.shape[1])),
            guidance=torch.from_numpy(guidance),
        ).sample.numpy()


def our_output(folder: Path, adapters: dict[str, Adapter]) -> np.ndarray:
    model = load_into(abstract_flux(TINY), DIFFUSERS, TensorFiles.open(folder))
    attach(model, adapters)
    latents, text, pooled, t, guidance = map(jnp.asarray, inputs())
    rope = rope_for(TINY, text.shape[1], (2, 3))
    flags = ConditionFlags(latent_lora=True)
    return np.asarray(model(latents, text, pooled, t, rope=rope, guidance=guidance, flags=flags))


def inputs() -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(0)
    shapes = (2, 6, TINY.in_channels), (2, 5, TINY.joint_attention_dim), (2, TINY.pooled_projection_dim)
    arrays = [draw.standard_normal(shape).astype(np.float32) for shape in shapes]
    return *arrays, np.asarray([0.3, 0.8], np.float32), np.asarray([3.5, 1.0], np.float32)


def mixed_adapters() -> dict[str, Adapter]:
    """On every linear, of several ranks and alphas; ``proj_out`` at the top differs from the blocks'."""
    draw = np.random.default_rng(1)
    adapters = {}
    for number, (path, (d_in, d_out)) in enumerate(linear_shapes(abstract_flux(TINY)).items()):
        rank, alpha = (3 if number % 5 == 0 else 2), (None, 1.0, 0.5)[number % 3]
        if path == "final_out":
            rank, alpha = 5, 7.25
        a = (draw.standard_normal((rank, d_in)) / 4).astype(np.float32)
        adapters[path] = Adapter(a, (draw.standard_normal((d_out, rank)) / 4).astype(np.float32), alpha)
    return adapters


@pytest.mark.parametrize("fold_alpha", [False, True])
def test_export_has_the_same_effect_in_diffusers(tmp_path, tiny, fold_alpha):
    _, folder = tiny
    adapters = mixed_adapters()
    file = export_lora(adapters, tmp_path, fold_alpha=fold_alpha)
    model = FluxTransformer2DModel.from_pretrained(folder)
    plain = their_output(model)
    pipeline(model).load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    want = their_output(model)
    assert abs(want - plain).max() > 0.1
    np.testing.assert_allclose(our_output(folder, adapters), want, atol=2e-4, rtol=1e-4)
    back = read_lora(file)
    np.testing.assert_allclose(our_output(folder, back.adapters), want, atol=2e-4, rtol=1e-4)


def test_what_diffusers_saves_with_its_metadata(tmp_path, tiny):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    _, folder = tiny
    model = FluxTransformer2DModel.from_pretrained(folder)
    targets = ["to_q", "to_k", "proj_mlp", "x_embedder", "norm_out.linear", "ff.net.2"]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        rank_pattern={"proj_mlp": 2},
        alpha_pattern={"to_q": 1.5, "norm_out.linear": 9},
        init_lora_weights=False,
    )
    torch.manual_seed(1)
    model.add_adapter(config)
    want = their_output(model)
    layers = get_peft_model_state_dict(model)
    metadata = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    lora = read_lora(tmp_path)
    assert lora.adapters["double_blocks.0.image.qkv.q"].alpha == 1.5
    np.testing.assert_allclose(our_output(folder, lora.adapters), want, atol=2e-4, rtol=1e-4)

    exported = TensorFiles.open(export_lora(lora, tmp_path / "again"))
    before = TensorFiles.open(tmp_path / "pytorch_lora_weights.safetensors")
    assert exported.keys() == before.keys()
    for key in before:
        np.testing.assert_array_equal(exported.read(key), before.read(key))


def test_peft_folder(tmp_path, tiny):
    """PEFT's own ``save_pretrained``: ``base_model.model.`` in front, alpha in ``adapter_config.json``."""
    from peft import LoraConfig, get_peft_model

    _, folder = tiny
    model = FluxTransformer2DModel.from_pretrained(folder)
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["to_v", "linear"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    want = their_output(wrapped)
    wrapped.save_pretrained(tmp_path)
    lora = read_lora(tmp_path)
    assert {adapter.scale for adapter in lora.adapters.values()} == {1.0}
    np.testing.assert_allclose(our_output(folder, lora.adapters), want, atol=2e-4, rtol=1e-4)
