"""Verifiers and writers by name, and a user's own."""

import re
from pathlib import Path

import pytest
import yaml

from rflow_jax.errors import InputError
from rflow_jax.openai_client.usage import UsageTracker
from rflow_jax.search.run_folder import public_section
from rflow_jax.utils.registry import Word
from rflow_jax.verifiers import make_verifier
from rflow_jax.verifiers.base import Verdict
from rflow_jax.verifiers.config import (
    VERIFIERS,
    EnsembleVerifierConfig,
    NoVerifierConfig,
    NvilaVerifierConfig,
    OpenAIVerifierConfig,
    PluginVerifierConfig,
    RewardVerifierConfig,
    YesNoVerifierConfig,
)
from rflow_jax.writers import REFINE_PROMPT, make_text_generator
from rflow_jax.writers.base import (
    WRITERS,
    HttpTextGeneratorConfig,
    PluginTextGeneratorConfig,
    QwenTextGeneratorConfig,
    WriterOutput,
)


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
    for registry in (VERIFIERS, WRITERS):
        for name, (kind, path) in registry.kinds.items():
            assert kind.__dataclass_fields__["name"].default == name
            assert callable(registry.load(name)) == bool(path)
    assert make_verifier(NoVerifierConfig()) is None


def test_a_class_of_ones_own_gets_the_config_and_the_meter():
    meter = UsageTracker()
    config = PluginVerifierConfig(name=OWN)
    assert make_verifier(config, meter).given == (config, meter)
    config = PluginTextGeneratorConfig(name=OWN)
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
        make_verifier(PluginVerifierConfig(name=OWN))
    with pytest.raises(InputError, match=f"writer {OWN}: {said}"):
        make_text_generator(PluginTextGeneratorConfig(name=OWN), REFINE_PROMPT)


@pytest.mark.parametrize(
    ("wrong", "near"), [("opanai", "openai"), ("YesNo", "yesno"), ("nono", "none"), ("", "openai")]
)
def test_an_unknown_name_is_bad_input_and_the_nearest_is_named(wrong, near):
    with pytest.raises(InputError, match=f"unknown verifier '{wrong}': did you mean {near}"):
        VERIFIERS.parse({"name": wrong})
    with pytest.raises(InputError, match="unknown writer 'htp': did you mean http"):
        WRITERS.parse({"name": "htp"})


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_such_module:Mine", "cannot import no_such_module"),
        ("rflow_jax.no_such:Mine", "cannot import rflow_jax.no_such"),
        (f"{__name__}:Yours", "has no Yours"),
        ("os:path", "is no class"),
    ],
)
def test_a_path_to_nothing_is_bad_input(path, problem):
    with pytest.raises(InputError, match=problem):
        make_verifier(PluginVerifierConfig(name=path))


def test_the_examples_of_the_documentation_are_configurations():
    page = (Path(__file__).parents[3] / "docs/verifiers.md").read_text()
    sections = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    configs = [VERIFIERS.parse(section["verifier"]) for section in sections if "verifier" in section]
    documented = {"openai", "yesno", "nvila", "reward", "clip", "checklist", "ensemble"}
    assert {config.name for config in configs} == documented
    assert len(sections) == len(configs) + 1
    assert WRITERS.parse(sections[3]["reflector"]).api_key_env == "LLAMA_FACTORY_KEY"


def test_an_error_repeats_no_text_that_may_be_secret():
    secret = "http://me:secret@host"
    for given, words in (
        ({"name": "ensemble", "members": [{"base_url": secret}, secret]}, "x.members[1]: "),
        ({"name": "ensemble", "members": secret}, "x.members: "),
        ({"timeout": secret}, "x.timeout: "),
        ({"base_url": "me:secret@host"}, "x: base_url must be an address"),
        ({"timeout": None}, "x.timeout is None: "),
    ):
        with pytest.raises(InputError) as caught:
            VERIFIERS.parse(given, source="x")
        assert str(caught.value).startswith(words)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("registry", "section", "said"),
    [
        (VERIFIERS, "{name: nvila, base_url: x}", "verifier.base_url: nvila has no such setting (openai, yesno would"),
        (VERIFIERS, "{name: nvila, concurrency: 99, options: {rank: word}}", "verifier.concurrency: nvila has no such"),
        (VERIFIERS, "{name: reward, model: m, prompts: mine}", "verifier.prompts: reward has no such setting (openai"),
        (
            VERIFIERS,
            "{name: yesno, temperature: 0}",
            "verifier.temperature: yesno has no such setting (openai",
        ),
        (VERIFIERS, "{name: nvila, dtype: float16}", "verifier: dtype is float16"),
        (VERIFIERS, "{name: reward, model: m, dtype: float16}", "verifier: dtype is float16"),
        (WRITERS, "{name: qwen, model: m, dtype: float16}", "writer: dtype is float16"),
        (VERIFIERS, "{name: ensemble, members: [{name: clip, 1: 2}]}", "unknown key verifier.members[0].1: "),
        (VERIFIERS, "{name: none, timeout: 3}", "would use it); leave it out"),
        (VERIFIERS, "{name: openai, options: {scale: 3}}", "unknown key verifier.scale: "),
        (
            WRITERS,
            "{name: qwen, model: m, max_tokens: 7}",
            "leave it out, or give one of model, dtype, batch_size,",
        ),
        (WRITERS, "{structured: text}", "unknown key writer.structured: known are name, base_url"),
        (WRITERS, "{name: qwen}", "writer.model: qwen needs it; name the checkpoint, a folder or a Hub id"),
        (WRITERS, "{name: qwen, seed: 1, options: {seed: 2}}", "writer: seed: given twice, once in options"),
        (VERIFIERS, "{name: openai, max_retries: true}", "verifier.max_retries is True: "),
        (VERIFIERS, "{name: clip, batchsize: 2}", "unknown key verifier.batchsize: did you mean verifier.batch_size?"),
        (VERIFIERS, "{name: ensemble, members: [{name: clip, template: x}]}", "verifier.members[0].template: clip has"),
    ],
)
def test_a_setting_that_a_kind_does_not_have_is_refused(registry, section, said):
    with pytest.raises(InputError) as caught:
        registry.parse(yaml.safe_load(section))
    assert said in str(caught.value)


# What a run of an earlier version wrote of each section, whatever its name.
WRITTEN = {"base_url": None, "model": None, "api_key_env": "OPENAI_API_KEY", "temperature": None, "max_tokens": None,
           "timeout": 20.0, "concurrency": 8, "max_retries": 3, "structured": "auto", "price_input": None,
           "price_output": None}  # fmt: skip
VERIFIER, WRITER = WRITTEN | {"prompts": None, "template": "question"}, WRITTEN | {"prompt_file": None}


@pytest.mark.parametrize(
    ("registry", "written", "config"),
    [
        (VERIFIERS, VERIFIER | {"name": "nvila", "options": {"rank": "margin"}}, NvilaVerifierConfig(rank="margin")),
        (
            VERIFIERS,
            VERIFIER | {"name": "reward", "model": "m", "options": {"devices": [1]}},
            RewardVerifierConfig("m", devices=(1,)),
        ),
        (
            VERIFIERS,
            VERIFIER | {"name": "ensemble", "options": {"members": [{"name": "nvila", "options": {"batch_size": 2}}]}},
            EnsembleVerifierConfig((NvilaVerifierConfig(batch_size=2),)),
        ),
        (
            VERIFIERS,
            VERIFIER | {"name": "openai", "model": "m", "options": {}},
            OpenAIVerifierConfig(model="m", timeout=20.0, max_retries=3),
        ),
        (
            VERIFIERS,
            VERIFIER | {"name": OWN, "temperature": 0.5, "options": {"a": 1}},
            PluginVerifierConfig(name=OWN, temperature=0.5, options={"a": 1}, timeout=20.0, max_retries=3),
        ),
        (
            WRITERS,
            WRITER | {"name": "qwen", "model": "m", "prompt_file": "p", "options": {"temperature": 0.5}},
            QwenTextGeneratorConfig("m", prompt_file="p", temperature=0.5),
        ),
        (
            WRITERS,
            WRITER | {"name": "http", "model": "m", "options": {}},
            HttpTextGeneratorConfig(model="m", timeout=20.0, max_retries=3),
        ),
    ],
)
def test_sections_that_a_run_has_written_are_read_and_mean_the_same(registry, written, config):
    public = yaml.safe_load(yaml.safe_dump(public_section(config)))
    assert registry.parse(written) == registry.parse(public) == config
    follow = registry.results_follow_from
    assert follow(written) == follow(public) == follow(public_section(config))
    assert follow(public) != follow(public | {"model": "another", "members": []})


def test_a_later_section_of_another_kind_leaves_out_what_this_kind_does_not_have():
    file = {"model": "m", "timeout": 20, "template": "raw", "name": "yesno"}
    found = VERIFIERS.parse(file, {"name": Word("nvila"), "batch_size": Word("4")})
    assert found == NvilaVerifierConfig("m", template="raw", batch_size=4)
    assert VERIFIERS.parse(file, {"model": Word("7")}) == YesNoVerifierConfig(model="7", timeout=20.0, template="raw")
    with pytest.raises(InputError, match=r"verifier\.timeout: nvila has no such setting"):
        VERIFIERS.parse({"name": "nvila"}, {"timeout": Word("3")})


def test_only_a_key_that_is_near_is_suggested():
    with pytest.raises(InputError, match=r"unknown key verifier\.weight: did you mean verifier\.weights"):
        VERIFIERS.parse({"name": "ensemble", "weight": []})
    with pytest.raises(InputError, match=r"unknown key verifier\.xyz: known are name, members, weights"):
        VERIFIERS.parse({"name": "ensemble", "xyz": [0]})
