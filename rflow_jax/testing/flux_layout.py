"""What a FLUX.1 folder in diffusers' layout holds: configurations, and key -> shape of every tensor.

Written out from sizes, without torch or diffusers, so that a machine with numpy alone can make such a folder
(:mod:`rflow_jax.testing.make_flux`). ``tests/parity/test_make_flux.py`` compares every key and shape with the
real classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rflow_jax.weights.published import DEV, Config

Shapes = dict[str, tuple[int, ...]]
Item = tuple[str, tuple[int, ...]]

# What differs from DEV. The tiny vocabularies are those of the tokenizers in tests/golden/pipeline.
CHANGES: dict[str, dict[str, Config]] = {
    "dev": {},
    "schnell": {
        "transformer": {"guidance_embeds": False},
        "scheduler": {"shift": 1.0, "use_dynamic_shifting": False},
    },
    "tiny": {
        "transformer": {
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 6, 6],
            "joint_attention_dim": 40,
            "num_attention_heads": 3,
            "num_layers": 2,
            "num_single_layers": 3,
            "pooled_projection_dim": 24,
        },
        "text_encoder": {
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "projection_dim": 24,
            "vocab_size": 774,
        },
        "text_encoder_2": {
            "d_ff": 64,
            "d_kv": 8,
            "d_model": 40,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_layers": 2,
            "vocab_size": 320,
        },
        "vae": {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "sample_size": 64},
    },
}


def configs(size: str) -> dict[str, Config]:
    """Folder name -> the content of its configuration file, for ``dev``, ``schnell`` or ``tiny``."""
    return {part: {**config, **CHANGES[size].get(part, {})} for part, config in DEV.items()}


def transformer_shapes(config: Mapping[str, Any]) -> Shapes:
    """FluxTransformer2DModel."""
    return dict(_transformer(config))


def clip_shapes(config: Mapping[str, Any]) -> Shapes:
    """CLIPTextModel."""
    return dict(_clip(config))


def t5_shapes(config: Mapping[str, Any]) -> Shapes:
    """T5EncoderModel; the tied copy of the embedding is not stored."""
    return dict(_t5(config))


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """AutoencoderKL without quantisation convolutions."""
    return dict([*_vae_encoder(config), *_vae_decoder(config)])


def lora_shapes(config: Mapping[str, Any], rank: int) -> Shapes:
    """The corrector's LoRA: two matrices for each linear that it was trained on (343 in dev and schnell)."""
    shapes: Shapes = {}
    weights = transformer_shapes(config)
    for module in lora_modules(config):
        d_out, d_in = weights[f"{module}.weight"]
        shapes[f"transformer.{module}.lora_A.weight"] = (rank, d_in)
        shapes[f"transformer.{module}.lora_B.weight"] = (d_out, rank)
    return shapes


def lora_modules(config: Mapping[str, Any]) -> list[str]:
    """The linears that the corrector's LoRA acts on."""
    qkv = ["attn.to_q", "attn.to_k", "attn.to_v"]
    double = ["norm1.linear", *qkv, "attn.to_out.0", "ff.net.2"]
    single = ["norm.linear", "proj_mlp", "proj_out", *qkv]
    doubles, singles = range(config["num_layers"]), range(config["num_single_layers"])
    return [
        "x_embedder",
        *(f"transformer_blocks.{i}.{name}" for i in doubles for name in double),
        *(f"single_transformer_blocks.{i}.{name}" for i in singles for name in single),
    ]


def _linear(name: str, d_in: int, d_out: int, bias: bool = True) -> Iterator[Item]:
    yield f"{name}.weight", (d_out, d_in)
    if bias:
        yield f"{name}.bias", (d_out,)


def _conv(name: str, c_in: int, c_out: int, kernel: int = 3) -> Iterator[Item]:
    yield f"{name}.weight", (c_out, c_in, kernel, kernel)
    yield f"{name}.bias", (c_out,)


def _norm(name: str, d: int) -> Iterator[Item]:
    yield f"{name}.weight", (d,)
    yield f"{name}.bias", (d,)


def _transformer(c: Mapping[str, Any]) -> Iterator[Item]:
    d = c["num_attention_heads"] * c["attention_head_dim"]
    embedders = {"timestep": 256, "guidance": 256, "text": c["pooled_projection_dim"]}
    for kind, d_in in embedders.items():
        if kind != "guidance" or c["guidance_embeds"]:
            yield from _linear(f"time_text_embed.{kind}_embedder.linear_1", d_in, d)
            yield from _linear(f"time_text_embed.{kind}_embedder.linear_2", d, d)
    yield from _linear("context_embedder", c["joint_attention_dim"], d)
    yield from _linear("x_embedder", c["in_channels"], d)
    for i in range(c["num_layers"]):
        yield from _double_block(f"transformer_blocks.{i}", d, c["attention_head_dim"])
    for i in range(c["num_single_layers"]):
        yield from _single_block(f"single_transformer_blocks.{i}", d, c["attention_head_dim"])
    yield from _linear("norm_out.linear", d, 2 * d)
    yield from _linear("proj_out", d, c["patch_size"] ** 2 * c["in_channels"])


def _double_block(block: str, d: int, head: int) -> Iterator[Item]:
    yield from _linear(f"{block}.norm1.linear", d, 6 * d)
    yield from _linear(f"{block}.norm1_context.linear", d, 6 * d)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield f"{block}.attn.{name}.weight", (head,)
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        yield from _linear(f"{block}.attn.{name}", d, d)
    for name in ("ff", "ff_context"):
        yield from _linear(f"{block}.{name}.net.0.proj", d, 4 * d)
        yield from _linear(f"{block}.{name}.net.2", 4 * d, d)


def _single_block(block: str, d: int, head: int) -> Iterator[Item]:
    yield from _linear(f"{block}.norm.linear", d, 3 * d)
    yield from _linear(f"{block}.proj_mlp", d, 4 * d)
    yield from _linear(f"{block}.proj_out", 5 * d, d)
    yield f"{block}.attn.norm_q.weight", (head,)
    yield f"{block}.attn.norm_k.weight", (head,)
    for name in ("to_q", "to_k", "to_v"):
        yield from _linear(f"{block}.attn.{name}", d, d)


def _clip(c: Mapping[str, Any]) -> Iterator[Item]:
    d, m = c["hidden_size"], c["intermediate_size"]
    yield "text_model.embeddings.token_embedding.weight", (c["vocab_size"], d)
    yield "text_model.embeddings.position_embedding.weight", (c["max_position_embeddings"], d)
    for i in range(c["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", d, d)
        yield from _norm(f"{layer}.layer_norm1", d)
        yield from _linear(f"{layer}.mlp.fc1", d, m)
        yield from _linear(f"{layer}.mlp.fc2", m, d)
        yield from _norm(f"{layer}.layer_norm2", d)
    yield from _norm("text_model.final_layer_norm", d)


def _t5(c: Mapping[str, Any]) -> Iterator[Item]:
    d, inner = c["d_model"], c["num_heads"] * c["d_kv"]
    yield "shared.weight", (c["vocab_size"], d)
    for i in range(c["num_layers"]):
        attention, feed_forward = (f"encoder.block.{i}.layer.{k}" for k in (0, 1))
        for name in ("q", "k", "v"):
            yield from _linear(f"{attention}.SelfAttention.{name}", d, inner, bias=False)
        yield from _linear(f"{attention}.SelfAttention.o", inner, d, bias=False)
        if i == 0:  # the first block's table of relative positions serves all
            buckets = (c["relative_attention_num_buckets"], c["num_heads"])
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", buckets
        yield f"{attention}.layer_norm.weight", (d,)
        for name in ("wi_0", "wi_1"):
            yield from _linear(f"{feed_forward}.DenseReluDense.{name}", d, c["d_ff"], bias=False)
        yield from _linear(f"{feed_forward}.DenseReluDense.wo", c["d_ff"], d, bias=False)
        yield f"{feed_forward}.layer_norm.weight", (d,)
    yield "encoder.final_layer_norm.weight", (d,)


def _vae_encoder(c: Mapping[str, Any]) -> Iterator[Item]:
    widths = c["block_out_channels"]
    yield from _conv("encoder.conv_in", c["in_channels"], widths[0])
    for i, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        block = f"encoder.down_blocks.{i}"
        yield from _resnets(block, c_in, c_out, c["layers_per_block"])
        if i < len(widths) - 1:
            yield from _conv(f"{block}.downsamplers.0.conv", c_out, c_out)
    yield from _vae_middle("encoder", widths[-1])
    yield from _norm("encoder.conv_norm_out", widths[-1])
    yield from _conv("encoder.conv_out", widths[-1], 2 * c["latent_channels"])  # mean and log-variance


def _vae_decoder(c: Mapping[str, Any]) -> Iterator[Item]:
    widths = c["block_out_channels"][::-1]
    yield from _conv("decoder.conv_in", c["latent_channels"], widths[0])
    yield from _vae_middle("decoder", widths[0])
    for i, (c_in, c_out) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        block = f"decoder.up_blocks.{i}"
        yield from _resnets(block, c_in, c_out, c["layers_per_block"] + 1)
        if i < len(widths) - 1:
            yield from _conv(f"{block}.upsamplers.0.conv", c_out, c_out)
    yield from _norm("decoder.conv_norm_out", widths[-1])
    yield from _conv("decoder.conv_out", widths[-1], c["out_channels"])


def _vae_middle(side: str, d: int) -> Iterator[Item]:
    yield from _resnets(f"{side}.mid_block", d, d, 2)
    attention = f"{side}.mid_block.attentions.0"
    yield from _norm(f"{attention}.group_norm", d)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{attention}.{name}", d, d)


def _resnets(block: str, c_in: int, c_out: int, count: int) -> Iterator[Item]:
    for j in range(count):
        resnet = f"{block}.resnets.{j}"
        yield from _norm(f"{resnet}.norm1", c_in)
        yield from _conv(f"{resnet}.conv1", c_in, c_out)
        yield from _norm(f"{resnet}.norm2", c_out)
        yield from _conv(f"{resnet}.conv2", c_out, c_out)
        if c_in != c_out:
            yield from _conv(f"{resnet}.conv_shortcut", c_in, c_out, kernel=1)
        c_in = c_out
