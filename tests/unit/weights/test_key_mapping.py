"""Tables of names: one plan reads and writes, and whatever does not fit is an error that names the key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.models.flux.transformer import abstract_flux
from rflow_jax.weights.key_mapping import LEAVES, KeyMapping, Rule, plan
from rflow_jax.weights.loading import parameter_shapes
from rflow_jax.weights.mappings.flux import BFL, BFL_PREFIX, DIFFUSERS, bfl_config, bfl_mapping
from tests.kit.lora import TINY

TABLE = KeyMapping(
    "toy",
    (
        Rule(r"a\.q", "a.qkv"),
        Rule(r"a\.k", "a.qkv"),
        Rule(r"a\.v", "a.qkv"),
        Rule(r"last", "head.1", "swap_halves"),
        Rule(r"point", "point", "pointwise"),
        Rule(r"conv", "conv"),
        Rule(r"norm", "norm"),
        Rule(r"words", "shared"),
    ),
    ignore=(r"tied\..*",),
)


def shapes_of_toy(d_in: int, q: int, k: int, v: int, half: int) -> dict[str, tuple[int, ...]]:
    """In an order that is not that of the rules."""
    return {
        "a.v.kernel": (d_in, v),
        "a.q.kernel": (d_in, q),
        "a.k.kernel": (d_in, k),
        "a.k.bias": (k,),
        "a.q.bias": (q,),
        "a.v.bias": (v,),
        "last.kernel": (d_in, 2 * half),
        "last.bias": (2 * half,),
        "point.kernel": (d_in, q),
        "conv.kernel": (3, 2, d_in, q),
        "norm.scale": (q,),
        "words.embedding": (k, d_in),
    }


SIZES = st.tuples(*[st.integers(1, 5)] * 5)


@settings(deadline=None)
@given(SIZES, st.sampled_from(["float32", "int8"]))
def test_what_is_written_is_read_back(sizes, dtype):
    shapes = shapes_of_toy(*sizes)
    values = {
        path: np.random.default_rng(number).integers(-100, 100, shape).astype(dtype)
        for number, (path, shape) in enumerate(shapes.items())
    }
    the_plan = plan(TABLE, shapes)
    checkpoint = {key: the_plan.join(key, values) for key in the_plan.entries}
    the_plan.check({key: tensor.shape for key, tensor in checkpoint.items()}, "toy")
    back = {
        target.path: target.to_ours(rows)
        for key, tensor in checkpoint.items()
        for target, rows in the_plan.split(key, tensor)
    }
    assert back.keys() == values.keys()
    for path, value in values.items():
        np.testing.assert_array_equal(back[path], value)


def test_layouts():
    the_plan = plan(TABLE, shapes_of_toy(3, 4, 5, 6, 2))
    assert {key: the_plan.their_shape(key) for key in the_plan.entries} == {
        "a.qkv.weight": (15, 3),
        "a.qkv.bias": (15,),
        "head.1.weight": (4, 3),
        "head.1.bias": (4,),
        "point.weight": (4, 3, 1, 1),
        "conv.weight": (4, 3, 3, 2),
        "norm.weight": (4,),
        "shared.weight": (5, 3),
    }
    rows = [target.path for target in the_plan.entries["a.qkv.weight"]]
    assert rows == ["a.q.kernel", "a.k.kernel", "a.v.kernel"]
    (target,) = the_plan.entries["head.1.bias"]
    np.testing.assert_array_equal(target.to_ours(np.arange(4)), [2, 3, 0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), r"file: norm\.weight missing"),
        (lambda s: s.update({"more.weight": (1,)}), r"file: more\.weight not known"),
        (lambda s: s.update({"norm.weight": (7,)}), r"norm\.weight has shape \[7\], .* asks for \[4\]"),
        (lambda s: s.clear(), "a.qkv.bias, a.qkv.weight, conv.weight and 5 more keys missing"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, message):
    the_plan = plan(TABLE, shapes_of_toy(3, 4, 5, 6, 2))
    shapes = {key: the_plan.their_shape(key) for key in the_plan.entries} | {"tied.copy": (9, 9)}
    the_plan.check(shapes, "file")
    change(shapes)
    with pytest.raises(InputError, match=message):
        the_plan.check(shapes, "file")


@pytest.mark.parametrize("rules", [(), (Rule("a", "x"), Rule(r"[ab]", "y"))])
def test_a_table_must_speak_of_a_module_once(rules):
    with pytest.raises(LookupError, match="rules match our module 'a'"):
        plan(KeyMapping("bad", rules), {"a.kernel": (1, 1)})


@pytest.mark.parametrize("table", [DIFFUSERS, BFL], ids=["diffusers", "bfl"])
@pytest.mark.parametrize("guidance", [True, False])
def test_the_transformer_is_covered(table, guidance):
    shapes = parameter_shapes(abstract_flux(FluxConfig(num_layers=2, num_single_layers=2, guidance_embeds=guidance)))
    the_plan = plan(table, shapes)
    targets = [target.path for entry in the_plan.entries.values() for target in entry]
    assert sorted(targets) == sorted(shapes)


class TestBlackForestLabs:
    def shapes(self, config: FluxConfig, prefix: str = "") -> dict[str, tuple[int, ...]]:
        the_plan = plan(BFL, parameter_shapes(abstract_flux(config)))
        return {prefix + key: the_plan.their_shape(key) for key in the_plan.entries}

    def test_leaves(self):
        keys = self.shapes(TINY)
        assert "double_blocks.0.img_attn.norm.query_norm.scale" in keys
        assert BFL.leaves["scale"] == "scale"
        assert LEAVES["scale"] == "weight"

    @pytest.mark.parametrize("prefix", ["", BFL_PREFIX])
    def test_sizes_and_prefix(self, prefix):
        config = FluxConfig(
            num_layers=3,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=False,
            axes_dims_rope=(4, 14, 14),
        )
        shapes = self.shapes(config, prefix)
        assert bfl_config(shapes, "file") == config
        # A file that holds the whole pipeline.
        others = {"vae.encoder.conv_in.weight": (1,), "text_encoders.clip_l.x": (1,)} if prefix else {}
        plan(bfl_mapping(shapes), parameter_shapes(abstract_flux(config))).check(shapes | others, "file")

    def test_more_input_than_output_channels(self):
        shapes = self.shapes(TINY) | {"img_in.weight": (TINY.width, 384)}
        with pytest.raises(InputError, match="rotary axes of a head of 16"):
            bfl_config(shapes, "file")
        shapes["double_blocks.0.img_attn.norm.query_norm.scale"] = (32,)
        with pytest.raises(InputError, match="384 input and 64 output channels"):
            bfl_config(shapes, "file")

    def test_another_network(self):
        with pytest.raises(InputError, match="not a FLUX transformer of Black Forest Labs"):
            bfl_config({"img_in.weight": (8, 8)}, "file")
