"""The settings of sampling, which all images of a call share."""

from dataclasses import dataclass, fields

from rflow_jax.errors import InputError
from rflow_jax.models.flux.config import ConditionFlags

# FLUX's: the autoencoder shrinks by 8 and packing by 2. Checked before a model is loaded, which may need more.
_GRID = 16


@dataclass(frozen=True)
class SamplingConfig(ConditionFlags):
    """Settings of generation; names as in diffusers.

    Attributes:
        height: height of the generated image in pixels, a multiple of 16.
        width: width of the generated image in pixels, a multiple of 16.
        num_inference_steps: denoising steps; null takes the model's own (30 for dev, 4 for schnell).
        guidance_scale: the guidance fed to the network; schnell has no such input and ignores it.
        image_guidance_scale: how far to move away from the prediction for a black condition; 1 is off.
        condition_scale: weight of the attention between the condition and the rest; 1 is neutral.
        condition_size: the condition image is resized to this many pixels a side, a multiple of 16.
        batch_size: images denoised together.
        max_sequence_length: T5 tokens; null takes the model's own (512 for dev, 256 for schnell).
        vae_tiling: encode and decode pictures beyond the autoencoder's own size (1024 px) in tiles: less memory, and
            slight differences along their seams.
    """

    height: int = 1024
    width: int = 1024
    num_inference_steps: int | None = None
    guidance_scale: float = 3.5
    image_guidance_scale: float = 1.0
    condition_scale: float = 1.0
    condition_size: int = 512
    batch_size: int = 1
    max_sequence_length: int | None = None
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        for name in ("height", "width", "condition_size"):
            if (value := getattr(self, name)) < 1 or value % _GRID:
                nearest = max(_GRID, round(value / _GRID) * _GRID)
                raise InputError(f"{name} is {value}: give a positive multiple of {_GRID}, such as {nearest}")
        for name in ("num_inference_steps", "batch_size", "max_sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give at least 1")
        for field in fields(self):
            if field.name.endswith("_scale") and not 0 <= (value := getattr(self, field.name)) < float("inf"):
                raise InputError(f"{field.name} is {value}: give a finite number that is not negative")
        if self.condition_scale == 0:
            raise InputError("condition_scale is 0: give a positive number, or leave the condition out")
        if self.condition_scale != 1:
            self.require_scalable()


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
