"""LoRA on the network: which linears, attached and read back; files of every layout, and those that are refused."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rflow_jax.errors import InputError
from rflow_jax.models import lora as lora_module
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import FluxTransformer, abstract_flux
from rflow_jax.models.layers import ALL_ROWS, Linear
from rflow_jax.models.lora import Adapter, attach, init_lora, linear_shapes, select
from rflow_jax.models.options import CORRECTOR_TARGET_MODULES
from rflow_jax.weights.lora import metadata as metadata_module
from rflow_jax.weights.lora.export import export_lora, save_lora
from rflow_jax.weights.lora.read import read_lora
from rflow_jax.weights.mappings.flux import BFL, DIFFUSERS
from rflow_jax.weights.safetensors_io import TensorFiles
from rflow_jax.weights.saving import save_tensors
from tests.kit.lora import TINY, effect, keyed, module_shapes, random_lora

KOHYA = {"a": "lora_down.weight", "b": "lora_up.weight"}
LAYOUTS = {
    "diffusers": (DIFFUSERS, {"prefix": "transformer."}),
    "peft": (DIFFUSERS, {"prefix": "base_model.model."}),
    "peft in memory": (
        DIFFUSERS,
        {"prefix": "base_model.model.", "a": "lora_A.default.weight", "b": "lora_B.default.weight"},
    ),
    "no prefix": (DIFFUSERS, {}),
    "old diffusers": (DIFFUSERS, {"prefix": "transformer.", "a": "lora.down.weight", "b": "lora.up.weight"}),
    "kohya": (BFL, {"prefix": "lora_unet_", "flat": True, "alpha": 2.0, **KOHYA}),
    "kohya, diffusers' names": (DIFFUSERS, {"prefix": "lora_transformer_", "flat": True, "alpha": 2.0, **KOHYA}),
    "ai-toolkit": (BFL, {"prefix": "diffusion_model."}),
    "bfl": (BFL, {}),
    "bfl, down and up": (BFL, {**KOHYA}),
}
LINEARS = linear_shapes(abstract_flux(TINY))


@pytest.fixture
def write(tmp_path):
    def write(tensors, metadata=None):
        save_tensors(tmp_path / "lora.safetensors", tensors, metadata)
        return tmp_path / "lora.safetensors"

    return write


class TestNetwork:
    def test_the_originals_linears(self, golden):
        """As many as the original trains, and on the recorded model exactly those of its file."""
        assert len(select(linear_shapes(abstract_flux(FluxConfig())), CORRECTOR_TARGET_MODULES)) == 343
        config = FluxConfig.from_json(json.loads((golden / "pipeline/transformer/config.json").read_text()))
        chosen = select(linear_shapes(abstract_flux(config)), CORRECTOR_TARGET_MODULES)
        keys = json.loads((golden / "golden/lora_keys.json").read_text())
        modules = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in keys}
        assert {DIFFUSERS.module(path)[1] for path in chosen} == modules

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(InputError, match="matches no linear"):
            select(LINEARS, "nothing")

    def test_fresh_adapters_change_nothing(self):
        model = init_lora(FluxTransformer(TINY, rngs=nnx.Rngs(0)), 4, alpha=2.0, rngs=nnx.Rngs(1))
        adapters = lora_module.adapters_of(model)
        assert adapters.keys() == select(LINEARS, CORRECTOR_TARGET_MODULES).keys()
        assert {(a.rank, a.alpha) for a in adapters.values()} == {(4, 2.0)}
        assert not any(adapter.b.any() for adapter in adapters.values())
        everything = np.concatenate([adapter.a.ravel() for adapter in adapters.values()])
        assert everything.std() == pytest.approx(1 / 4, rel=0.05)

    def test_attach_read_back_detach(self):
        adapters = {
            "image_in": Adapter(np.ones((3, 64), np.float32), np.ones((32, 3), np.float32), 1.0),
            "final_out": Adapter(np.ones((2, 32), np.float32), np.ones((64, 2), np.float32)),
        }
        model = attach(abstract_flux(TINY), adapters, dtype=jnp.bfloat16)
        assert model.image_in.lora_a.shape == (64, 3)
        assert model.image_in.lora_a.dtype == jnp.bfloat16
        back = lora_module.adapters_of(model)
        assert {path: (a.rank, a.alpha) for path, a in back.items()} == {"final_out": (2, 2.0), "image_in": (3, 1.0)}
        attach(model, {"final_out": adapters["final_out"]})
        assert model.image_in.lora_a is None
        lora_module.detach(model)
        assert lora_module.adapters_of(model) == {}

    def test_shapes_for_compiling_ahead(self):
        model = lora_module.attach_shapes(abstract_flux(TINY), {"image_in": 4})
        assert isinstance(model.image_in.lora_b.get_value(), jax.ShapeDtypeStruct)
        with pytest.raises(InputError, match="not a linear"):
            lora_module.attach_shapes(model, {"nothing": 4})

    def test_the_scale_is_not_rounded_to_bfloat16(self):
        x = jnp.ones((1, 4), jnp.bfloat16)
        linear = Linear(4, 1, use_bias=False, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        linear.kernel.set_value(jnp.zeros((4, 1), jnp.bfloat16))
        # 257 / 256 would be rounded to 1; 255 * 257 / 256 is 255.996.
        adapter = Adapter(np.full((1, 4), 255 / 4), np.ones((1, 1)), 257 / 256)
        attach(nnx.Dict(linear=linear), {"linear": adapter}, dtype=jnp.bfloat16)
        np.testing.assert_array_equal(linear(x, ALL_ROWS), [[256.0]])

    @pytest.mark.parametrize(
        ("adapters", "message"),
        [
            ({}, "can have no effect"),
            ({"double_blocks.9.image.out": (2, 32, 32)}, r"file: double_blocks\.9\.image\.out is not a linear"),
            ({"image_in": (2, 48, 32)}, r"A \[2, 48\] and B \[32, 2\].* takes 64 and gives 32.*another network"),
            ({"image_in": (2, 64, 31)}, "a LoRA for another network"),
        ],
    )
    def test_a_lora_for_another_network(self, adapters, message):
        made = {path: Adapter(np.ones((r, i)), np.ones((o, r))) for path, (r, i, o) in adapters.items()}
        with pytest.raises(InputError, match=message):
            attach(abstract_flux(TINY), made, source="file")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_on_every_linear(write, layout):
    """The effect of each file is that of its own tensors, cut and ordered as the checkpoint's rows are."""
    table, keys = LAYOUTS[layout]
    lora = random_lora(module_shapes(table), rank=3)
    adapters = read_lora(write(keyed(lora, **keys))).adapters
    lora_module.check_fit(adapters, LINEARS)
    assert adapters.keys() == LINEARS.keys()
    scale = keys.get("alpha", 3.0) / 3.0
    for module, (a, b) in lora.items():
        parts = [path for path in LINEARS if table.module(path)[1] == module]
        parts.sort(key=lambda path: table.module(path)[0])
        whole = effect(Adapter(a, b)) * scale
        if module == "final_layer.adaLN_modulation.1":
            whole = np.concatenate(np.split(whole, 2)[::-1])
        np.testing.assert_allclose(np.concatenate([effect(adapters[p]) for p in parts]), whole, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    modules=st.sets(st.sampled_from(sorted(LINEARS)), min_size=1, max_size=5),
    rank=st.integers(1, 3),
    alpha=st.none() | st.floats(0.25, 8, width=32),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_in_and_out_again(tmp_path_factory, modules, rank, alpha, dtype):
    folder = tmp_path_factory.mktemp("lora")
    lora = random_lora({DIFFUSERS.module(path)[1]: LINEARS[path] for path in modules}, rank, dtype=dtype)
    tensors = keyed(lora, prefix="transformer.")
    save_tensors(folder / "in.safetensors", tensors)
    ours = save_lora(read_lora(folder / "in.safetensors", alpha=alpha), folder / "ours")
    out = TensorFiles.open(export_lora(read_lora(ours), folder / "out"))
    assert set(out) == set(tensors)
    for key, value in tensors.items():
        assert out.read(key).dtype == value.dtype
        np.testing.assert_array_equal(out.read(key), value)
    scale = 1.0 if alpha is None else alpha / rank
    assert all(a.scale == pytest.approx(scale) for a in read_lora(folder / "out").values())
    folded = read_lora(export_lora(read_lora(ours), folder / "folded", fold_alpha=True))
    assert {a.scale for a in folded.values()} == {1.0}


def test_the_recorded_lora(golden):
    lora = read_lora(golden / "lora")
    assert {(a.rank, a.alpha, a.a.dtype) for a in lora.values()} == {(4, None, np.dtype(np.float32))}


ONE = keyed(random_lora({"x_embedder": (64, 32)}), prefix="transformer.")
A, B = (f"transformer.x_embedder.lora_{side}.weight" for side in "AB")


class TestAlpha:
    def test_precedence(self, write):
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 5})}
        kohya = {"ss_network_alpha": "3.0"}
        alpha = {"transformer.x_embedder.alpha": np.asarray(7, np.float32)}

        def of(tensors, metadata=None, **options):
            return read_lora(write(tensors, metadata), **options)["image_in"].alpha

        assert of(ONE) is None
        assert of(ONE, alpha=4.0) == 4
        assert of(ONE, kohya, alpha=4.0) == 3
        assert of(ONE, metadata | kohya, alpha=4.0) == 5
        assert of(ONE | alpha, metadata | kohya, alpha=4.0) == 7

    def test_patterns_and_rslora(self, write):
        config = {"lora_alpha": 4, "alpha_pattern": {"^x_embedder": 3.0}, "use_rslora": True}
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
        two = ONE | keyed(random_lora({"context_embedder": (24, 32)}, 4), prefix="transformer.")
        lora = read_lora(write(two, metadata))
        assert lora["image_in"].scale == pytest.approx(3 / 2**0.5)
        assert lora["text_in"].scale == pytest.approx(4 / 4**0.5)

    @pytest.mark.parametrize(
        ("pattern", "matched"),
        [
            ("x_embedder", {"x_embedder"}),
            (r"blocks.0.attn.to_q", set()),
            (r"transformer_blocks\.\d+\.attn\.to_(q|k)", {"transformer_blocks.1.attn.to_q"}),
            (r"^(?!.*single).*attn.*", {"transformer_blocks.1.attn.to_q"}),
            (r".*(embedder|attn\..*)", {"x_embedder", "transformer_blocks.1.attn.to_q"}),
        ],
    )
    def test_patterns_are_those_of_peft(self, pattern, matched):
        modules = ["x_embedder", "transformer_blocks.1.attn.to_q", "context_embedder.other"]
        assert set(metadata_module.match_patterns([pattern], modules, "file")[pattern]) == matched

    @pytest.mark.parametrize("pattern", ["(.*)*x", "([a-z_]+)+$y", ".*" * 30 + "x"])
    def test_a_pattern_that_would_never_end(self, monkeypatch, pattern):
        monkeypatch.setattr(metadata_module, "_SECONDS", 0.3)
        with pytest.raises(InputError, match="file: patterns of alpha_pattern take too long, such as"):
            metadata_module.match_patterns([pattern], ["single_transformer_blocks.1.attn.to_q" * 2], "file")

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"lora_adapter_metadata": "{"}, "cannot be read as JSON"),
            ({"lora_adapter_metadata": '{"transformer.use_dora": true}'}, "use_dora"),
            ({"lora_adapter_metadata": '{"transformer.lora_alpha": "x"}'}, "expected a finite number"),
            ({"ss_network_alpha": "x"}, "ss_network_alpha in its metadata is 'x'"),
            ({"lora_adapter_metadata": '{"transformer.peft_type": "LOKR"}'}, "peft_type LOKR; only LoRA"),
            ({"lora_adapter_metadata": '{"transformer.alpha_pattern": [1]}'}, "alpha_pattern is .*expected an object"),
            ({"lora_adapter_metadata": '{"transformer.alpha_pattern": {"(": 1}}'}, r"cannot be used, such as '\('"),
            ({"lora_adapter_metadata": "[" * 100_000}, "cannot be read as JSON"),
        ],
    )
    def test_metadata_that_cannot_be_used(self, write, metadata, message):
        with pytest.raises(InputError, match=message):
            read_lora(write(ONE, metadata))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.nothing.lora_A.weight": ONE[A]}, r"nothing\.lora_A\.weight is not a LoRA of a linear"),
        ({"transformer.x_embedder.weight": ONE[A]}, "is not a LoRA of a linear"),
        ({B: None}, "x_embedder has A but no B"),
        ({A: None, B: None, "transformer.x_embedder.alpha": np.ones(())}, "x_embedder has alpha but no A and B"),
        ({A: ONE[A][:1]}, r"A \[1, 64\] and B \[32, 2\]"),
        ({"x_embedder.lora_A.weight": ONE[A]}, "second A of x_embedder"),
        (keyed(random_lora({"img_in": (64, 32)})), "(img_in|x_embedder) is a second adapter of image_in"),
        ({"transformer.x_embedder.alpha": np.ones(2)}, r"alpha of x_embedder has shape \[2\]"),
        ({"transformer.x_embedder.alpha": np.asarray(np.nan)}, r"x_embedder\.alpha has numbers that are NaN"),
        ({"transformer.x_embedder.lora_magnitude_vector": np.ones(3)}, "DoRA"),
        ({"lora_unet_img_in.dora_scale": np.ones(3)}, "DoRA"),
        ({"transformer.x_embedder.lora_B.bias": np.ones(32)}, "a bias of its own"),
        ({"lora_unet_img_in.diff": np.ones((2, 2))}, "a difference of whole tensors"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": np.ones(16)}, "changes norms"),
        ({"lora_unet_img_in.diff_b": np.ones(2)}, "a difference of whole tensors"),
        ({"lora_unet_img_in.lokr_w1": np.ones((2, 2)), "a.dora_scale": np.ones(2)}, "a LoKr, as lora_unet_img_in"),
        ({"transformer.x_embedder.hada_w1_a": np.ones((2, 2))}, "a LoHa"),
        ({"base_model.model.x_embedder.oft_r": np.ones((2, 2))}, "an OFT"),
        ({"lora_unet_img_in.oft_diag": np.ones((2, 2))}, "an OFT"),
        ({"transformer.x_embedder.boft_R": np.ones((2, 2))}, "a BOFT"),
        ({"base_model.model.x_embedder.ia3_l": np.ones(2)}, "an IA3"),
        ({"lora_unet_img_in.lora_mid.weight": np.ones((2, 2))}, "a LoCon with Tucker"),
        ({"bundle_emb.name.string_to_params": np.ones(2)}, "OneTrainer's bundle"),
        ({"zzz.lokr_w2": np.ones((2, 2)), "aaa.not_known": np.ones(1)}, "a LoKr"),
        ({A: np.ones((2, 64), np.int8)}, "stored as int8; expected floating-point numbers"),
        (keyed(random_lora({"single_blocks.0.linear1": (32, 90)})), "a LoRA for another network"),
        ({A: None, B: None}, "can have no effect"),
    ],
)
def test_refused(write, tensors, message):
    content = {key: value for key, value in (ONE | tensors).items() if value is not None}
    with pytest.raises(InputError, match=message):
        read_lora(write(content))


def test_differences_of_zero_are_left_out(write):
    assert read_lora(write(ONE | {"lora_unet_img_in.diff_b": np.zeros(3, np.float32)})).keys() == {"image_in"}


@pytest.mark.parametrize(
    "prefix",
    ["text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "text_encoders.clip_l.", "module.text_encoder."],
)
def test_adapters_of_text_encoders_are_left_out_with_one_warning(write, caplog, prefix):
    file = write(ONE | keyed(random_lora({"text_model.layers.0.q": (4, 4)}), prefix=prefix))
    assert read_lora(file).keys() == {"image_in"}
    (warning,) = caplog.messages
    assert f"left out what is for a text encoder (2 tensors, such as '{prefix}text_model" in warning
    assert "ignore" not in warning  # nothing is advised that only some commands have
    caplog.clear()
    assert read_lora(file, ignore_text_encoder=True).keys() == {"image_in"}
    assert not caplog.messages


def test_a_lora_of_a_text_encoder_alone(write):
    with pytest.raises(InputError, match="has no adapter of the transformer"):
        read_lora(write(keyed(random_lora({"text_model.layers.0.q": (4, 4)}), prefix="lora_te1_")))


@pytest.mark.parametrize(
    ("prefix", "flat", "change"),
    [
        ("_orig_mod.", False, lambda key: key),
        ("module.", False, lambda key: key),
        ("module._orig_mod.transformer.", False, lambda key: key),
        ("base_model.model._orig_mod.", False, lambda key: key),
        ("transformer.", False, lambda key: key.replace("blocks.0.", "blocks.0._orig_mod.")),
        ("lora_unet_", True, lambda key: key.replace(".lora_", "_.lora_")),
        ("lora_unet__", True, lambda key: key),
        ("lycoris_", True, lambda key: key),
    ],
)
def test_what_wrappers_add_to_names_changes_nothing(write, prefix, flat, change):
    lora = random_lora(module_shapes(DIFFUSERS))
    want = read_lora(write(keyed(lora, prefix="base_model.model."))).adapters
    got = read_lora(write({change(key): value for key, value in keyed(lora, prefix=prefix, flat=flat).items()}))
    assert got.keys() == want.keys()
    for path, adapter in want.items():
        np.testing.assert_array_equal(effect(got[path]), effect(adapter))


XLABS = {
    "double_blocks.1.processor.qkv_lora1": [f"transformer_blocks.1.attn.to_{part}" for part in "qkv"],
    "double_blocks.1.processor.qkv_lora2": [f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.1.processor.proj_lora1": ["transformer_blocks.1.attn.to_out.0"],
    "double_blocks.1.processor.proj_lora2": ["transformer_blocks.1.attn.to_add_out"],
    "single_blocks.0.processor.qkv_lora": [f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    "single_blocks.0.processor.proj_lora": ["single_transformer_blocks.0.proj_out"],
}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(write, prefix):
    """The same numbers under XLabs' names and in PEFT's layout have the same effect."""
    shapes = module_shapes(DIFFUSERS)
    lora = random_lora({name: (shapes[own[0]][0], len(own) * shapes[own[0]][1]) for name, own in XLABS.items()})
    by_module = {
        module: (a, rows)
        for name, (a, b) in lora.items()
        for module, rows in zip(XLABS[name], np.split(b, len(XLABS[name])), strict=True)
    }
    want = read_lora(write(keyed(by_module, prefix="base_model.model."))).adapters
    got = read_lora(write(keyed(lora, prefix=prefix, a="down.weight", b="up.weight"))).adapters
    lora_module.check_fit(got, LINEARS)
    assert got.keys() == want.keys()
    for path, adapter in want.items():
        np.testing.assert_array_equal(effect(got[path]), effect(adapter))


def test_nothing_to_export(tmp_path):
    with pytest.raises(InputError, match="carries none"):
        export_lora(abstract_flux(TINY), tmp_path)


def test_a_pickle_is_not_read_unasked(tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"")
    with pytest.raises(InputError, match="--allow_pickle"):
        read_lora(tmp_path / "lora.bin")
