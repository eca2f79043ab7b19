"""A model folder whose tokenizer brings code, or a chat template that never ends."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from rflow_jax.errors import InputError
from rflow_jax.tokenizers import chat_template
from rflow_jax.tokenizers.chat_template import ChatTemplate
from rflow_jax.tokenizers.flux import load_tokenizer
from rflow_jax.tokenizers.qwen import QwenTokenizer
from rflow_jax.weights.hub import BUNDLED

CODE = "from pathlib import Path\nPath('ran').touch()\nclass Own: pass\n"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("config", ["tokenizer_config.json", "config.json"])
def test_code_of_a_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    (folder / "vocab.json").write_text("{}")
    auto = {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own"}
    (folder / config).write_text(json.dumps({"auto_map": auto, "model_type": "own", "tokenizer_class": "Own"}))
    with pytest.raises(InputError, match=r"model.*auto_map names Python code"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_needs_no_code_is_read_beside_some(tmp_path):
    folder = shutil.copytree(BUNDLED[0] / "shapes" / "tokenizer", tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    assert load_tokenizer(folder)("a star")["input_ids"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ 'a'|center(9999999999) }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ range(99999)|join('a' * 10000) }}",
        "{% set x = 'aaaaaaaa' %}" + "{% set x = x ~ x %}" * 60,
        "{% set n = namespace(x='aaaaaaaa') %}" + "{% set n.x = n.x ~ n.x %}" * 60,
        "{% set x = [1, 2] %}" + "{% set x = x + x %}" * 60,
        "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
        "{% set x = {'a': 1} %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x|tojson }}",
        "{% set x = 'aa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% set x = 'a' * 9999999 %}{{ ([x] * 99999)|map('upper')|join }}",
        "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}",
        "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
        "{% macro f(x) %}{{ f(x) ~ f(x) if x else '' }}{% endmacro %}{{ f(1) }}",
        "{{ ('a' * 1000)" + ".replace('a', 'a' * 1000)" * 5 + " }}",
        "{{ (" + "~".join(["('a' * 10000000)"] * 500) + ")|length }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ lipsum(99999) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    ],
)
def test_a_template_ends_in_bounded_time_and_memory(tmp_path, monkeypatch, template):
    monkeypatch.setattr(chat_template, "_SECONDS", 1)
    folder = shutil.copytree(Path(str(BUNDLED[1] / "tiny-qwen2.5-vl")), tmp_path / "q")
    (folder / "chat_template.jinja").write_text(template)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"chat_template.jinja: the chat template does not work \("):
        QwenTokenizer(folder)
    assert time.monotonic() - began < 6


def test_numbers_are_no_texts():
    text = "{{ 1000000 * 1000000 }} {% set n = namespace(sum=0) %}"
    text += "{% for i in range(5000) %}{% set n.sum = n.sum + i %}{% endfor %}"
    assert ChatTemplate(text + "{{ n.sum }}").render([]) == "1000000000000 12497500"


def test_of_several_named_templates_the_default_counts(tmp_path):
    folder = shutil.copytree(Path(str(BUNDLED[1] / "tiny-qwen2.5-vl")), tmp_path / "q")
    whole = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": whole}]
    before = QwenTokenizer(folder).chat(MESSAGES)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert QwenTokenizer(folder).chat(MESSAGES) == before


def test_templates_as_models_have_them_are_rendered():
    text = (
        "{%- set n = namespace(count=0) %}{% for m in messages %}{% set n.count = n.count + 1 %}"
        "{% generation %}{{ m.role ~ ':' + m['content'].strip().split('x')[0] }}{% endgeneration %}\n"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ n.count }}{{ {'a': 'é'}|tojson }}"
        "{{ 'abc'|replace('b', 'd') }}{{ ['a', 'b']|join(', ') }}{% if add_generation_prompt %}A{% endif %}"
    )
    rendered = ChatTemplate(text).render(MESSAGES, add_generation_prompt=True)
    assert rendered == 'user:hi1{"a": "é"}adca, bA'
