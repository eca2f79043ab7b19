"""The FLUX transformer's names in diffusers' checkpoints and in Black Forest Labs' single files."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import FluxConfig
from rflow_jax.weights.key_mapping import LEAVES, KeyMapping, Rule

DIFFUSERS = KeyMapping(
    "FLUX transformer (diffusers)",
    (
        Rule(r"image_in", r"x_embedder"),
        Rule(r"text_in", r"context_embedder"),
        Rule(r"time_in\.linear_([12])", r"time_text_embed.timestep_embedder.linear_\1"),
        Rule(r"guidance_in\.linear_([12])", r"time_text_embed.guidance_embedder.linear_\1"),
        Rule(r"pooled_in\.linear_([12])", r"time_text_embed.text_embedder.linear_\1"),
        # double-stream blocks
        Rule(r"double_blocks\.(\d+)\.image\.mod", r"transformer_blocks.\1.norm1.linear"),
        Rule(r"double_blocks\.(\d+)\.image\.qkv\.([qkv])", r"transformer_blocks.\1.attn.to_\2"),
        Rule(r"double_blocks\.(\d+)\.image\.qkv\.(norm_[qk])", r"transformer_blocks.\1.attn.\2"),
        Rule(r"double_blocks\.(\d+)\.image\.out", r"transformer_blocks.\1.attn.to_out.0"),
        Rule(r"double_blocks\.(\d+)\.image\.ff\.up", r"transformer_blocks.\1.ff.net.0.proj"),
        Rule(r"double_blocks\.(\d+)\.image\.ff\.down", r"transformer_blocks.\1.ff.net.2"),
        Rule(r"double_blocks\.(\d+)\.text\.mod", r"transformer_blocks.\1.norm1_context.linear"),
        Rule(r"double_blocks\.(\d+)\.text\.qkv\.([qkv])", r"transformer_blocks.\1.attn.add_\2_proj"),
        Rule(r"double_blocks\.(\d+)\.text\.qkv\.norm_([qk])", r"transformer_blocks.\1.attn.norm_added_\2"),
        Rule(r"double_blocks\.(\d+)\.text\.out", r"transformer_blocks.\1.attn.to_add_out"),
        Rule(r"double_blocks\.(\d+)\.text\.ff\.up", r"transformer_blocks.\1.ff_context.net.0.proj"),
        Rule(r"double_blocks\.(\d+)\.text\.ff\.down", r"transformer_blocks.\1.ff_context.net.2"),
        # single-stream blocks
        Rule(r"single_blocks\.(\d+)\.mod", r"single_transformer_blocks.\1.norm.linear"),
        Rule(r"single_blocks\.(\d+)\.qkv\.([qkv])", r"single_transformer_blocks.\1.attn.to_\2"),
        Rule(r"single_blocks\.(\d+)\.qkv\.(norm_[qk])", r"single_transformer_blocks.\1.attn.\2"),
        Rule(r"single_blocks\.(\d+)\.mlp", r"single_transformer_blocks.\1.proj_mlp"),
        Rule(r"single_blocks\.(\d+)\.out", r"single_transformer_blocks.\1.proj_out"),
        Rule(r"final_mod", r"norm_out.linear"),
        Rule(r"final_out", r"proj_out"),
    ),
)

# q, k and v (and the single block's mlp) have a rule each: the fused rows have the order of the rules.
BFL = KeyMapping(
    "FLUX transformer (Black Forest Labs)",
    (
        Rule(r"image_in", r"img_in"),
        Rule(r"text_in", r"txt_in"),
        Rule(r"time_in\.linear_1", r"time_in.in_layer"),
        Rule(r"time_in\.linear_2", r"time_in.out_layer"),
        Rule(r"guidance_in\.linear_1", r"guidance_in.in_layer"),
        Rule(r"guidance_in\.linear_2", r"guidance_in.out_layer"),
        Rule(r"pooled_in\.linear_1", r"vector_in.in_layer"),
        Rule(r"pooled_in\.linear_2", r"vector_in.out_layer"),
        *(
            rule
            for ours, theirs in (("image", "img"), ("text", "txt"))
            for rule in (
                Rule(rf"double_blocks\.(\d+)\.{ours}\.mod", rf"double_blocks.\1.{theirs}_mod.lin"),
                Rule(rf"double_blocks\.(\d+)\.{ours}\.qkv\.q", rf"double_blocks.\1.{theirs}_attn.qkv"),
                Rule(rf"double_blocks\.(\d+)\.{ours}\.qkv\.k", rf"double_blocks.\1.{theirs}_attn.qkv"),
                Rule(rf"double_blocks\.(\d+)\.{ours}\.qkv\.v", rf"double_blocks.\1.{theirs}_attn.qkv"),
                Rule(rf"double_blocks\.(\d+)\.{ours}\.qkv\.norm_q", rf"double_blocks.\1.{theirs}_attn.norm.query_norm"),
                Rule(rf"double_blocks\.(\d+)\.{ours}\.qkv\.norm_k", rf"double_blocks.\1.{theirs}_attn.norm.key_norm"),
                Rule(rf"double_blocks\.(\d+)\.{ours}\.out", rf"double_blocks.\1.{theirs}_attn.proj"),
                Rule(rf"double_blocks\.(\d+)\.{ours}\.ff\.up", rf"double_blocks.\1.{theirs}_mlp.0"),
                Rule(rf"double_blocks\.(\d+)\.{ours}\.ff\.down", rf"double_blocks.\1.{theirs}_mlp.2"),
            )
        ),
        Rule(r"single_blocks\.(\d+)\.mod", r"single_blocks.\1.modulation.lin"),
        Rule(r"single_blocks\.(\d+)\.qkv\.q", r"single_blocks.\1.linear1"),
        Rule(r"single_blocks\.(\d+)\.qkv\.k", r"single_blocks.\1.linear1"),
        Rule(r"single_blocks\.(\d+)\.qkv\.v", r"single_blocks.\1.linear1"),
        Rule(r"single_blocks\.(\d+)\.mlp", r"single_blocks.\1.linear1"),
        Rule(r"single_blocks\.(\d+)\.qkv\.norm_q", r"single_blocks.\1.norm.query_norm"),
        Rule(r"single_blocks\.(\d+)\.qkv\.norm_k", r"single_blocks.\1.norm.key_norm"),
        Rule(r"single_blocks\.(\d+)\.out", r"single_blocks.\1.linear2"),
        # Black Forest Labs order the last modulation (shift, scale), diffusers and we (scale, shift).
        Rule(r"final_mod", r"final_layer.adaLN_modulation.1", "swap_halves"),
        Rule(r"final_out", r"final_layer.linear"),
    ),
    leaves=LEAVES | {"scale": "scale"},
)

# XLabs' LoRA files, under names of attention processors; they have no other modules.
XLABS = (
    *(
        rule
        for ours, number in (("image", 1), ("text", 2))
        for rule in (
            Rule(rf"double_blocks\.(\d+)\.{ours}\.qkv\.q", rf"double_blocks.\1.processor.qkv_lora{number}"),
            Rule(rf"double_blocks\.(\d+)\.{ours}\.qkv\.k", rf"double_blocks.\1.processor.qkv_lora{number}"),
            Rule(rf"double_blocks\.(\d+)\.{ours}\.qkv\.v", rf"double_blocks.\1.processor.qkv_lora{number}"),
            Rule(rf"double_blocks\.(\d+)\.{ours}\.out", rf"double_blocks.\1.processor.proj_lora{number}"),
        )
    ),
    Rule(r"single_blocks\.(\d+)\.qkv\.q", r"single_blocks.\1.processor.qkv_lora"),
    Rule(r"single_blocks\.(\d+)\.qkv\.k", r"single_blocks.\1.processor.qkv_lora"),
    Rule(r"single_blocks\.(\d+)\.qkv\.v", r"single_blocks.\1.processor.qkv_lora"),
    Rule(r"single_blocks\.(\d+)\.out", r"single_blocks.\1.processor.proj_lora"),
)

# Files of a whole pipeline have this before the transformer's keys, and these other parts:
BFL_PREFIX = "model.diffusion_model."
OTHER_PARTS = (r"vae\..*", r"text_encoders\..*", r"first_stage_model\..*", r"cond_stage_model\..*")


def bfl_mapping(keys: Iterable[str]) -> KeyMapping:
    """:data:`BFL` with the prefix that the keys of a single file carry."""
    if any(key.startswith(BFL_PREFIX) for key in keys):
        return replace(BFL, prefix=BFL_PREFIX, ignore=OTHER_PARTS)
    return BFL


def is_bfl(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a transformer in Black Forest Labs' layout."""
    return any(key.removeprefix(BFL_PREFIX) == "double_blocks.0.img_attn.qkv.weight" for key in keys)


def bfl_config(shapes: Mapping[str, tuple[int, ...]], source: str) -> FluxConfig:
    """Reads the sizes of a single file's transformer (dev or schnell) from its tensors.

    Raises:
        InputError: not a FLUX transformer, or one with more input than output channels (fill, depth, canny).
    """
    by_key = {key.removeprefix(BFL_PREFIX): shape for key, shape in shapes.items()}
    table = bfl_mapping(shapes)
    if empty := next((key for key, shape in shapes.items() if 0 in shape and not table.ignores(key)), None):
        raise InputError(f"{source}: {empty} has the shape {list(shapes[empty])}, so it holds nothing")
    try:
        width, in_channels = by_key["img_in.weight"]
        head = by_key["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        out_channels = by_key["final_layer.linear.weight"][0]
        config = {
            "in_channels": in_channels,
            "num_layers": _count(by_key, "double_blocks"),
            "num_single_layers": _count(by_key, "single_blocks"),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": by_key["txt_in.weight"][1],
            "pooled_projection_dim": by_key["vector_in.in_layer.weight"][1],
            "guidance_embeds": "guidance_in.in_layer.weight" in by_key,
            "axes_dims_rope": _rope_axes(head, source),
            "mlp_ratio": by_key["double_blocks.0.img_mlp.0.weight"][0] / width,
        }
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not a FLUX transformer of Black Forest Labs ({error})") from error
    if out_channels != in_channels:
        raise InputError(
            f"{source}: {in_channels} input and {out_channels} output channels; "
            "FLUX.1 dev and schnell have as many of both (fill, depth and canny models do not fit)"
        )
    return FluxConfig(**config)


def _count(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> int:
    numbers = {int(key.split(".")[1]) for key in shapes if key.startswith(f"{blocks}.")}
    if missing := {*range(len(numbers))} - numbers:
        raise ValueError(f"{blocks}.{min(missing)} is missing")
    return len(numbers)


def _rope_axes(head: int, source: str) -> tuple[int, ...]:
    """FLUX gives an eighth of the head to the index axis and the rest to rows and columns, in equal parts."""
    first = head // 8
    rest = (head - first) // 2
    if head % 8 or first % 2 or rest % 2 or first + 2 * rest != head:
        raise InputError(f"{source}: the rotary axes of a head of {head} are not known; convert a diffusers folder")
    return (first, rest, rest)
