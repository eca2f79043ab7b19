"""How a model generates unless told otherwise, and what its folder may say of it."""

import re

import pytest

from rflow_jax.errors import InputError
from rflow_jax.generation.config import SamplingConfig
from rflow_jax.weights.defaults import DEFAULTS_KEY, SamplingDefaults


def of_model(recorded, guidance_embeds=True):
    return SamplingDefaults.of_model({DEFAULTS_KEY: recorded}, guidance_embeds=guidance_embeds, source="index.json")


def test_the_published_models():
    dev = SamplingDefaults.of_model({}, guidance_embeds=True, source="")
    assert vars(dev) == {
        "height": 1024, "width": 1024, "condition_size": 512, "num_inference_steps": 30, "guidance_scale": 3.5,
        "max_sequence_length": 512,
    }  # fmt: skip
    schnell = SamplingDefaults.of_model({}, guidance_embeds=False, source="")
    assert (schnell.num_inference_steps, schnell.max_sequence_length) == (4, 256)


def test_what_is_recorded_holds_unless_a_setting_is_given():
    recorded = {"height": 96, "num_inference_steps": 20, "guidance_scale": 0}
    defaults = of_model(recorded)
    assert (defaults.height, defaults.width, defaults.guidance_scale) == (96, 1024, 0)
    settings = SamplingConfig(width=64, num_inference_steps=2, latent_lora=True).resolve(defaults)
    assert (settings.height, settings.width, settings.num_inference_steps) == (96, 64, 2)
    assert settings.latent_lora


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ([], "_rflow_defaults is []: an object was expected"),
        ({"hight": 96}, "_rflow_defaults has 'hight'; known: height, width, "),
        ({"height": "96"}, "height of _rflow_defaults is '96': give a number from 1"),
        ({"height": 96.0}, "height of _rflow_defaults is 96.0: give a number from 1"),
        ({"width": 0}, "width of _rflow_defaults is 0: give a number from 1"),
        ({"num_inference_steps": True}, "num_inference_steps of _rflow_defaults is True"),
        ({"guidance_scale": float("nan")}, "guidance_scale of _rflow_defaults is nan: give a number from 0"),
        ({"max_sequence_length": None}, "max_sequence_length of _rflow_defaults is None"),
    ],
)
def test_records_that_are_not_usable(recorded, message):
    with pytest.raises(InputError, match=f"^index.json: {re.escape(message)}"):
        of_model(recorded)
