"""How a model generates unless a setting says otherwise: FLUX.1's own numbers, or those that its folder records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rflow_jax.errors import InputError

DEFAULTS_KEY = "_rflow_defaults"  # of model_index.json; diffusers passes over names that begin so


@dataclass(frozen=True)
class SamplingDefaults:
    """Sizes in pixels, steps and so on, named as in :class:`~rflow_jax.generation.config.SamplingConfig`.

    The numbers here are those of FLUX.1-dev, as the corrector was trained and evaluated.
    """

    height: int = 1024
    width: int = 1024
    condition_size: int = 512
    num_inference_steps: int = 30
    guidance_scale: float = 3.5
    max_sequence_length: int = 512

    @classmethod
    def of_model(cls, info: Mapping[str, Any], *, guidance_embeds: bool, source: object) -> SamplingDefaults:
        """The defaults of a model.

        Args:
            info: content of its ``model_index.json``.
            guidance_embeds: false of a model that is distilled for few steps, such as FLUX.1-schnell.
            source: of ``info``, for errors.

        Raises:
            InputError: what is recorded there is not usable.
        """
        own = cls() if guidance_embeds else replace(cls(), num_inference_steps=4, max_sequence_length=256)
        recorded = info.get(DEFAULTS_KEY, {})
        if not isinstance(recorded, Mapping):
            raise InputError(f"{source}: {DEFAULTS_KEY} is {recorded!r}: an object was expected")
        for name, value in recorded.items():
            if name not in cls.__dataclass_fields__:
                raise InputError(f"{source}: {DEFAULTS_KEY} has {name!r}; known: {', '.join(cls.__dataclass_fields__)}")
            kinds = (int, float) if name == "guidance_scale" else int
            least = 0 if name == "guidance_scale" else 1
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < float("inf"):
                raise InputError(f"{source}: {name} of {DEFAULTS_KEY} is {value!r}: give a number from {least}")
        return replace(own, **recorded)
