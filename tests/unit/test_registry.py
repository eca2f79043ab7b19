"""Verifiers and writers by name, and a user's own."""

import re
from pathlib import Path

import pytest
import yaml
from rflow_jax.utils.plugins import load_class, parse_options

from rflow_jax.errors import InputError
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.search.run_folder import public_section
from rflow_jax.verifiers import VERIFIERS, VerifierConfig, make_verifier
from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.config import EnsembleOptions
from rflow_jax.writers import REFINE_PROMPT, TextGeneratorConfig, make_text_generator
from rflow_jax.writers.base import WRITERS, WriterOutput


class Mine:
    """A verifier and a writer of a user's own."""

    name, concurrency, batch_size = "mine", 1, 4

    def __init__(self, *given):
        self.given = given

    def score(self, images, items):
        return [Verdict(1.0) for _ in images]

    def write(self, cases):
        return [WriterOutput("text") for _ in cases]

    def close(self):
        pass


OWN = f"{__name__}:Mine"


def test_every_known_name_has_a_class():
    for kind, table in (("verifier", VERIFIERS), ("writer", WRITERS)):
        for name in table:
            assert callable(load_class(kind, name, table))
    assert make_verifier(VerifierConfig(name="none")) is None


def test_a_class_of_ones_own_gets_the_config_and_the_meter():
    meter = UsageTracker()
    config = VerifierConfig(name=OWN)
    assert make_verifier(config, meter).given == (config, meter)
    config = TextGeneratorConfig(name=OWN)
    assert make_text_generator(config, REFINE_PROMPT, meter).given == (config, REFINE_PROMPT, meter)


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ({"concurrency": 0}, "its concurrency is 0: give a whole number from 1"),
        ({"batch_size": 0.5}, "its batch_size is 0.5"),
        ({"concurrency": None}, "its concurrency is None"),
        ({"name": None}, "give it a name"),
        ({"close": None}, "it has no method close"),
        ({"score": None, "write": None}, "it has no method (score|write)"),
    ],
)
def test_a_class_of_ones_own_that_lacks_something_is_named(monkeypatch, lacks, said):
    for name, value in lacks.items():
        monkeypatch.setattr(Mine, name, value)
    with pytest.raises(InputError, match=f"verifier {OWN}: {said}"):
        make_verifier(VerifierConfig(name=OWN))
    with pytest.raises(InputError, match=f"writer {OWN}: {said}"):
        make_text_generator(TextGeneratorConfig(name=OWN), REFINE_PROMPT)


@pytest.mark.parametrize(
    ("wrong", "near"), [("opanai", "openai"), ("YesNo", "yesno"), ("nono", "none"), ("", "openai")]
)
def test_an_unknown_name_is_bad_input_and_the_nearest_is_named(wrong, near):
    with pytest.raises(InputError, match=f"unknown verifier '{wrong}': did you mean {near}"):
        VerifierConfig(name=wrong)
    with pytest.raises(InputError, match="unknown writer 'htp': did you mean http"):
        TextGeneratorConfig(name="htp")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_such_module:Mine", "cannot import no_such_module"),
        ("rflow_jax.no_such:Mine", "cannot import rflow_jax.no_such"),
        (f"{__name__}:Yours", "has no Yours"),
    ],
)
def test_a_path_to_nothing_is_bad_input(path, problem):
    with pytest.raises(InputError, match=problem):
        make_verifier(VerifierConfig(name=path))


def test_the_examples_of_the_documentation_are_configurations():
    page = (Path(__file__).parents[2] / "docs/verifiers.md").read_text()
    sections = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    configs = [VerifierConfig(**section["verifier"]) for section in sections if "verifier" in section]
    assert {config.name for config in configs} == {"openai", "yesno", "nvila", "reward", "clip", "ensemble"}
    assert len(sections) == len(configs) + 1
    assert TextGeneratorConfig(**sections[3]["reflector"]).api_key_env == "LLAMA_FACTORY_KEY"


def test_an_error_in_options_repeats_no_text_that_may_be_secret():
    secret = "http://me:secret@host"
    for given, words in (
        ({"members": [{"base_url": secret}, secret]}, "x: members[1]: "),
        ({"weights": secret}, "x: weights: "),
        ({"weights": 3}, "x: weights is 3: "),
    ):
        with pytest.raises(InputError) as caught:
            parse_options(EnsembleOptions, given, "x")
        assert str(caught.value).startswith(words)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "section", "said"),
    [
        (VerifierConfig, {"name": "nvila", "template": "raw"}, "template: nvila .*: give options.template"),
        (VerifierConfig, {"name": "reward", "prompts": "mine"}, "prompts: reward .*: give options.prompt_file"),
        (VerifierConfig, {"name": "clip", "temperature": 0.0}, "temperature: clip asks no endpoint .*: leave it out"),
        (TextGeneratorConfig, {"name": "qwen", "temperature": 0.9}, "temperature: qwen .*: give options.temperature"),
        (TextGeneratorConfig, {"name": "qwen", "max_tokens": 7}, "max_tokens: qwen .*: give options.max_new_tokens"),
        (
            VerifierConfig,
            {"name": "ensemble", "options": {"members": [{"name": "clip", "template": "raw"}]}},
            r"ensemble\.options\.members\[0\]: template: clip",
        ),
    ],
)
def test_settings_that_a_model_in_this_process_would_ignore_are_refused(kind, section, said):
    with pytest.raises(InputError, match=said):
        kind(**section)


def test_sections_that_a_run_has_published_are_read_again():
    ensemble = {"members": [{"name": "clip"}, {"name": "nvila", "options": {"template": "raw"}}]}
    for config in (
        VerifierConfig(name="reward", model="m", timeout=20.0, max_retries=3),
        VerifierConfig(name="ensemble", options=ensemble),
        VerifierConfig(name=OWN, temperature=0.5, template="mine"),
        TextGeneratorConfig(name="qwen", model="m", concurrency=2),
    ):
        assert type(config)(**public_section(config)) == config


def test_only_a_key_that_is_near_is_suggested():
    with pytest.raises(InputError, match="unknown key weight: did you mean weights"):
        parse_options(EnsembleOptions, {"weight": []}, "x")
    with pytest.raises(InputError, match="unknown key devices: known are members, weights"):
        parse_options(EnsembleOptions, {"devices": [0]}, "x")
