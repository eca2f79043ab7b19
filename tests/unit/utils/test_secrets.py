"""Secrets in the wrong place are refused or hidden, and words that are none stay."""

from itertools import islice
from pathlib import Path

import pytest

from rflow_jax.data.config import DataConfig
from rflow_jax.data.records import SUBSETS
from rflow_jax.data.sources.open import open_loader
from rflow_jax.data.storage.retry import RetryPolicy, public
from rflow_jax.errors import InputError
from rflow_jax.openai_client.endpoint import Endpoint, Secrets
from rflow_jax.training.checkpoints import _compare
from rflow_jax.training.config import CorrectorRunConfig
from rflow_jax.utils import cli
from rflow_jax.utils.secrets import public_addresses, without_secrets
from rflow_jax.verifiers.config import VERIFIERS
from rflow_jax.writers.base import WRITERS
from tests.kit.file_server import FileServer
from tests.kit.genref_tars import write_shards

KEYS = [
    "sk-proj-abcdEFGH1234567890xyz",
    "hf_abcdEFGH1234567890xyz",
    "gsk_abcdEFGH1234567890xyz",
    "AKIAABCDEFGH12345678",
    "AIzaabcdEFGH1234567890xyzabcdEFGH1234567",
    "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abc",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_place_of_a_model_is_refused_and_not_shown(key, monkeypatch, capsys):
    with pytest.raises(InputError, match="model looks like a key") as caught:
        Endpoint(model=key)
    assert key not in str(caught.value)
    monkeypatch.setenv("OPENAI_MODEL", key)
    with pytest.raises(InputError, match="OPENAI_MODEL looks like a key"):
        _ = Endpoint().model_name

    def main():
        raise InputError(f"unknown verifier {key!r}: did you mean openai?")

    assert cli.run(main) == 2
    said = capsys.readouterr().err
    assert key[8:] not in said
    assert f"unknown verifier '{key[:4]}***" in said


def test_values_of_the_environment_are_hidden_in_messages(monkeypatch):
    assert without_secrets("https://me:pw@host/a?sig=1: no record") == "https://host/a no record"
    monkeypatch.setenv("TEAM_PASSWORD", "correct horse battery")
    assert without_secrets("no file correct horse battery/x") == "no file corr***/x"


@pytest.mark.parametrize(
    "text", ["a task-oriented-and-very-long-name", "runs/sk-1", "mask_of_something_longer_than_it"]
)
def test_plain_words_stay(text):
    assert without_secrets(text) == text
    assert Endpoint(model=text).model == text


OWN = {"name": "package.module:Class"}


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "abc"},
        {"apiKey": "abc"},
        {"deep": {"list": [{"password": "abc"}]}},
        {"token": "abc"},
        {"client_secret": "abc"},
        {"access_token": "abc"},
        {"anything": KEYS[0]},
    ],
)
@pytest.mark.parametrize("registry", [VERIFIERS, WRITERS])
def test_an_option_that_holds_a_secret_is_refused(registry, options):
    for section in (OWN | {"options": options}, {"extra_body": options}):
        with pytest.raises(InputError, match="would stand in the run's files") as caught:
            registry.parse(section)
        assert "abc" not in str(caught.value)


def test_options_that_hold_none_are_taken():
    options = {
        "api_key_env": "MINE",
        "token": "$MINE",
        "max_tokens": 5,
        "tokenizer": "t5",
        "eos_token": "</s>",
        "key": "value",
        "secret": None,
    }
    assert VERIFIERS.parse(OWN | {"options": options}).options == options
    with pytest.raises(InputError, match=r"did you mean verifier\.api_key_env"):
        VERIFIERS.parse({"name": "openai", "options": {"api_key": "abc"}})


@pytest.mark.parametrize("key", ["x", "abc", "EMPTY", "dummy"])
def test_a_short_placeholder_for_a_key_hides_no_other_words(key):
    said = "an example: tax exempt, abcde and dummyfied"
    assert Secrets(key, "http://localhost/v1?v=1").hide(said) == said


def test_a_short_key_is_hidden_where_it_stands_alone():
    assert Secrets("letme7", None).hide("wrong key: 'letme7'.") == "wrong key: ***"


ADDRESSES = {
    "https://me:p%40ss@host/a/{000..208}.tar": "https://host/a/{000..208}.tar",
    "https://me:p@ss@host/a.tar": "https://host/a.tar",
    "https://host/a.tar?X-Amz-Signature=abc&x=1": "https://host/a.tar",
    "https://host/a.tar#token=abc": "https://host/a.tar",
    "https://me:p'w@host/a.tar": "https://host/a.tar",
    "https://me:p w@host/a.tar": "https://host/a.tar",
    "s3://key:secret@bucket/a?.tar": "s3://bucket/a?.tar",
    "hf://datasets/owner/name@main/a.tar": "hf://datasets/owner/name@main/a.tar",
    "folder/me@home?.tar": "folder/me@home?.tar",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_lose_what_may_be_secret(address):
    assert public(address) == public_addresses(address) == ADDRESSES[address]
    assert public_addresses({"data": {"path": [address]}}) == {"data": {"path": [ADDRESSES[address]]}}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://me:p'w@host/a.tar", "https://host/a.tar"),
        ('at "https://me:p"w@host/a": no', 'at "https://host/a": no'),
        ("https://host/a?sig=a'b&x=1 and more", "https://host/a and more"),
        ("('https://host/a?sig=1', 2)", "('https://host/a', 2)"),
        ("https://host/a.tar#access_token=abc", "https://host/a.tar"),
        ("HTTPS://me:pw@host/a?b", "HTTPS://host/a"),
    ],
)
def test_odd_addresses_lose_it_too(text, left):
    assert public_addresses(text) == left


@pytest.mark.parametrize("format", ["tar", "stream"])
def test_secrets_of_training_data_are_in_no_position_index_or_message(format, tmp_path, caplog, capsys):
    write_shards(tmp_path / "shards", 1, 8)
    damaged = (tmp_path / "shards/000.tar").read_bytes()
    (tmp_path / "shards/001.tar").write_bytes(damaged[: len(damaged) // 2])
    with FileServer(tmp_path / "shards") as server:
        url = server.url.replace("//", "//me:hidden-pw@") + "/{000..001}.tar?X-Amz-Signature=hidden-signature"
        equal = {name: [1.0, 1.0] for name in SUBSETS}
        sizes = {"target_size": 16, "condition_size": 8, "workers": 0, "skip_limit": 9}
        retry = RetryPolicy(timeout=1.0, max_retries=0, max_backoff=0.01)
        config = DataConfig(url, format, equal, cache=str(tmp_path / "cache"), retry=retry, **sizes)
        with open_loader(config, seed=1, batch_size=4, slots=range(4)) as loader:
            read = list(islice(loader, 4))
            said = repr((read, loader.position(3)))
        server.faults.status = 99
        with pytest.raises(InputError) as caught:
            open_loader(config, seed=1, batch_size=4, slots=range(4))
    kept = b"".join(file.read_bytes() for file in (tmp_path / "cache").glob("*")).decode("latin-1")
    captured = capsys.readouterr()
    for text in (said, kept, caplog.text, captured.out, captured.err, str(caught.value)):
        assert "hidden" not in text
    assert "127.0.0.1" in str(caught.value)
    assert "001.tar" in said + caplog.text


def test_a_pipes_addresses_too():
    command = "pipe:curl -s 'https://me:pw@host/a.tar?sig=1' | cat"
    assert public_addresses(command) == "pipe:curl -s 'https://host/a.tar' | cat"


def test_a_trainings_settings_are_public_in_its_files():
    config = CorrectorRunConfig(model="m", out="o", data=DataConfig("https://me:pw@host/a.tar?sig=1"))
    assert "pw" not in str(config.public()) + str(config.flat())
    assert config.data.path == "https://me:pw@host/a.tar?sig=1"
    # A run of an earlier version, and one with another password, go on.
    _compare({"data.pairs": "https://me:old@host/a"}, {"data.pairs": "https://host/a"}, Path("o"))
    again = CorrectorRunConfig(model="m", out="o", data=DataConfig("https://me:new@host/a.tar?sig=2"))
    assert again.flat() == config.flat()
