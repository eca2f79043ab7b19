"""The settings of sampling, which all images of a call share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import ConditionFlags
from rflow_jax.utils.ranges import BatchSize, DenoisingSteps, NotNegative, Side, Tokens, require_ranges
from rflow_jax.weights.defaults import SamplingDefaults

# FLUX's: the autoencoder shrinks by 8 and packing by 2. Checked before a model is loaded, which may need more.
_GRID = 16


@dataclass(frozen=True)
class SamplingConfig(ConditionFlags):
    """Settings of generation; names as in diffusers.

    Attributes:
        height: height of the generated image in pixels, a multiple of 16; null takes the model's own (FLUX.1: 1024).
        width: width of the generated image in pixels, likewise.
        num_inference_steps: denoising steps; null takes the model's own (30 for dev, 4 for schnell).
        guidance_scale: the guidance fed to the network; null takes the model's own (FLUX.1: 3.5). Schnell has no such
            input and ignores it.
        image_guidance_scale: how far to move away from the prediction for a black condition; 1 is off.
        condition_scale: weight of the attention between the condition and the rest; 1 is neutral.
        condition_size: the condition image is resized to this many pixels a side, a multiple of 16; null takes the
            model's own (FLUX.1: 512).
        batch_size: images denoised together.
        max_sequence_length: T5 tokens; null takes the model's own (512 for dev, 256 for schnell).
        vae_tiling: encode and decode pictures beyond the autoencoder's own size (1024 px) in tiles: less memory, and
            slight differences along their seams.
    """

    height: Side | None = None
    width: Side | None = None
    num_inference_steps: DenoisingSteps | None = None
    guidance_scale: NotNegative | None = None
    image_guidance_scale: NotNegative = 1.0
    condition_scale: NotNegative = 1.0
    condition_size: Side | None = None
    batch_size: BatchSize = 1
    max_sequence_length: Tokens | None = None
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        require_ranges(self)
        for name in ("height", "width", "condition_size"):
            if (value := getattr(self, name)) is not None and value % _GRID:
                nearest = max(_GRID, round(value / _GRID) * _GRID)
                raise InputError(f"{name} is {value}: give a positive multiple of {_GRID}, such as {nearest}")
        if self.condition_scale == 0:
            raise InputError("condition_scale is 0: give a positive number, or leave the condition out")
        if self.condition_scale != 1:
            self.require_scalable()

    def resolve(self, defaults: SamplingDefaults) -> ResolvedSampling:
        """The settings with the model's own numbers where there is none."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {name: value for name, value in vars(defaults).items() if given[name] is None}
        return ResolvedSampling(**given | own)


@dataclass(frozen=True)
class ResolvedSampling(SamplingConfig):
    """Settings of one model, of which none is open; by default FLUX.1-dev's."""

    height: Side = SamplingDefaults.height
    width: Side = SamplingDefaults.width
    num_inference_steps: DenoisingSteps = SamplingDefaults.num_inference_steps
    guidance_scale: NotNegative = SamplingDefaults.guidance_scale
    condition_size: Side = SamplingDefaults.condition_size
    max_sequence_length: Tokens = SamplingDefaults.max_sequence_length


def require_lora_effect(settings: SamplingConfig, with_condition: bool) -> None:
    """Raises InputError for settings with which no LoRA can change the image."""
    if settings.latent_lora:
        return
    if not with_condition:
        raise InputError(
            "the LoRA acts on condition tokens only, and without a condition it has no effect: give a condition, "
            "set latent_lora, or leave the LoRA out"
        )
    if not settings.union_cond_attn and not settings.add_cond_attn:
        raise InputError(
            "the LoRA acts on condition tokens only, and with union_cond_attn false the image does not see these: "
            "set union_cond_attn, add_cond_attn or latent_lora, or leave the LoRA out"
        )
