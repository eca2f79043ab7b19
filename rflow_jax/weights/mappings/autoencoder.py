"""The autoencoder's names: diffusers' ``vae`` folder and Black Forest Labs' ``ae.safetensors``."""

from __future__ import annotations

from collections.abc import Iterable

from rflow_jax.weights.key_mapping import KeyMapping, Rule

_QUANT = Rule(r"((post_)?quant_conv)", r"\1")

DIFFUSERS = KeyMapping(
    "FLUX autoencoder (diffusers)",
    (
        _QUANT,
        Rule(r"(encoder|decoder)\.(conv_in|conv_out)", r"\1.\2"),
        Rule(r"(encoder|decoder)\.norm_out", r"\1.conv_norm_out"),
        Rule(r"(encoder|decoder)\.mid\.resnet_1\.(norm[12]|conv[12])", r"\1.mid_block.resnets.0.\2"),
        Rule(r"(encoder|decoder)\.mid\.resnet_2\.(norm[12]|conv[12])", r"\1.mid_block.resnets.1.\2"),
        Rule(r"(encoder|decoder)\.mid\.attn\.norm", r"\1.mid_block.attentions.0.group_norm"),
        Rule(r"(encoder|decoder)\.mid\.attn\.([qkv])", r"\1.mid_block.attentions.0.to_\2"),
        Rule(r"(encoder|decoder)\.mid\.attn\.out", r"\1.mid_block.attentions.0.to_out.0"),
        Rule(
            r"(encoder|decoder)\.(down|up)\.(\d+)\.resnets\.(\d+)\.(norm[12]|conv[12])",
            r"\1.\2_blocks.\3.resnets.\4.\5",
        ),
        Rule(
            r"(encoder|decoder)\.(down|up)\.(\d+)\.resnets\.(\d+)\.shortcut",
            r"\1.\2_blocks.\3.resnets.\4.conv_shortcut",
        ),
        Rule(r"encoder\.down\.(\d+)\.downsample", r"encoder.down_blocks.\1.downsamplers.0.conv"),
        Rule(r"decoder\.up\.(\d+)\.upsample", r"decoder.up_blocks.\1.upsamplers.0.conv"),
    ),
)

_BFL_LEVEL_FREE = (
    _QUANT,
    Rule(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)", r"\1.\2"),
    Rule(r"(encoder|decoder)\.mid\.resnet_([12])\.(norm[12]|conv[12])", r"\1.mid.block_\2.\3"),
    Rule(r"(encoder|decoder)\.mid\.attn\.norm", r"\1.mid.attn_1.norm"),
    Rule(r"(encoder|decoder)\.mid\.attn\.([qkv])", r"\1.mid.attn_1.\2", via="pointwise"),
    Rule(r"(encoder|decoder)\.mid\.attn\.out", r"\1.mid.attn_1.proj_out", via="pointwise"),
)


def bfl(levels: int) -> KeyMapping:
    """The names in ``ae.safetensors``.

    Args:
        levels: number of resolutions, ``len(config.block_out_channels)``. Their decoder counts them from the
            image inwards, ours (as diffusers') from the latents outwards.
    """
    down = [_bfl_level(f"encoder.down.{level}", f"encoder.down.{level}") for level in range(levels)]
    up = [_bfl_level(f"decoder.up.{level}", f"decoder.up.{levels - 1 - level}") for level in range(levels)]
    return KeyMapping("FLUX autoencoder (ae.safetensors)", (*_BFL_LEVEL_FREE, *sum(down + up, ())))


def autoencoder_mapping(keys: Iterable[str], levels: int) -> KeyMapping:
    """The table of a checkpoint, detected by its keys."""
    return bfl(levels) if any(key.startswith("encoder.down.") for key in keys) else DIFFUSERS


def _bfl_level(ours: str, theirs: str) -> tuple[Rule, ...]:
    ours = ours.replace(".", r"\.")
    return (
        Rule(rf"{ours}\.resnets\.(\d+)\.(norm[12]|conv[12])", rf"{theirs}.block.\1.\2"),
        Rule(rf"{ours}\.resnets\.(\d+)\.shortcut", rf"{theirs}.block.\1.nin_shortcut"),
        Rule(rf"{ours}\.(downsample|upsample)", rf"{theirs}.\1.conv"),
    )
