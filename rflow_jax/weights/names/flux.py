"""The FLUX transformer's names in diffusers' checkpoints."""

from rflow_jax.weights.tables import Rule, Table

DIFFUSERS = Table(
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
